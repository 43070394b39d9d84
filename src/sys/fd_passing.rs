//! Messages over Unix sockets that carry descriptors (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr};

/// The most descriptors that one message may carry; the kernel's own limit is 253.
pub const MAX_FDS: usize = 16;

/// Sends one message with descriptors, without SIGPIPE.
pub fn send_with_fds(
    socket: BorrowedFd<'_>,
    data: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        let sent = socket::sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(data)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Err(Errno::EINTR) => {}
            sent => return Ok(sent?),
        }
    }
}

/// Receives one message and the descriptors that came with it, each close-on-exec. A length of 0 is
/// the end of the connection. A message that does not fit is EMSGSIZE, never cut off silently.
pub fn recv_with_fds(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    loop {
        match recv_once(socket, buffer) {
            // A signal is no end of the wait.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn recv_once(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; MAX_FDS]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = socket::recvmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            for fd in raw {
                // SAFETY: the kernel has just installed this descriptor in our table for this
                // message; nobody else knows of it.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if message
        .flags
        .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC)
    {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok((message.bytes, fds))
}

/// Accepts a connection; the descriptor is close-on-exec.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd = loop {
        match socket::accept4(listener.as_raw_fd(), socket::SockFlag::SOCK_CLOEXEC) {
            Err(Errno::EINTR) => {}
            accepted => break accepted?,
        }
    };
    // SAFETY: accept4 has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use nix::sys::pthread::{pthread_kill, pthread_self};
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn a_descriptor_travels_with_its_message() {
        let (a, b) = pair();
        let file = File::open("/proc/self/stat").unwrap();
        send_with_fds(a.as_fd(), b"here", &[file.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let (n, mut fds) = recv_with_fds(b.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"here");
        let mut text = String::new();
        File::from(fds.pop().unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert!(!text.is_empty());
        drop(a);
        assert_eq!(recv_with_fds(b.as_fd(), &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn a_message_that_does_not_fit_is_an_error() {
        let (a, b) = pair();
        send_with_fds(a.as_fd(), &[7; 100], &[]).unwrap();
        let error = recv_with_fds(b.as_fd(), &mut [0; 10]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    }

    extern "C" fn nothing(_signal: i32) {}

    /// The end of the OCI runtime's child interrupted the wait for a terminal: the terminal was lost, and its process went on
    /// without one.
    #[test]
    fn a_signal_does_not_lose_the_message_that_is_waited_for() {
        let action = SigAction::new(
            SigHandler::Handler(nothing),
            SaFlags::empty(),
            SigSet::empty(),
        );
        // SAFETY: the handler does nothing, and no other test uses this signal.
        unsafe { sigaction(Signal::SIGUSR2, &action) }.unwrap();
        let (a, b) = pair();
        let (tell, told) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || {
            tell.send(pthread_self()).unwrap();
            recv_with_fds(b.as_fd(), &mut [0; 16]).unwrap().0
        });
        let thread = told.recv().unwrap();
        for _ in 0..20 {
            pthread_kill(thread, Signal::SIGUSR2).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        send_with_fds(a.as_fd(), b"here", &[]).unwrap();
        assert_eq!(waiting.join().unwrap(), 4);
    }
}
