//! Messages over Unix sockets that carry descriptors (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
    Ok(socket::sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(data)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?)
}

/// Receives one message and the descriptors that came with it, each close-on-exec. A length of 0 is
/// the end of the connection. A message that does not fit is EMSGSIZE, never cut off silently.
pub fn recv_with_fds(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
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
    let fd = socket::accept4(listener.as_raw_fd(), socket::SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

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
}
