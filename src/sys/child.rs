//! Waiting for children without missing one: a signal handler that wakes a poll loop, and pidfds.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::fcntl::OFlag;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Pid, pipe2, read};

/// The pipe that the handler writes to; -1 until there is one.
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// A descriptor that becomes readable when one of the chosen signals has arrived.
///
/// The signals are handled, neither blocked nor ignored: a handler is reset by execve, so children
/// start with the default disposition and an empty mask.
#[derive(Debug)]
pub struct SignalPipe {
    reader: OwnedFd,
}

impl SignalPipe {
    /// Installs the handler. A process has at most one; a second call is an error.
    pub fn install(signals: &[Signal]) -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        if WAKE
            .compare_exchange(-1, writer.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst)
            .is_err()
        {
            return Err(io::Error::other("the signal pipe is installed already"));
        }
        // The handler needs the descriptor for as long as the process lives.
        std::mem::forget(writer);
        let action = SigAction::new(
            SigHandler::Handler(wake),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        for &signal in signals {
            // SAFETY: `wake` calls only write(2) and errno's location, both async-signal-safe.
            unsafe { sigaction(signal, &action) }?;
        }
        Ok(Self { reader })
    }

    /// Empties the pipe.
    pub fn clear(&self) {
        let mut bytes = [0; 64];
        while matches!(read(&self.reader, &mut bytes), Ok(length) if length == bytes.len()) {}
    }
}

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

extern "C" fn wake(_signal: libc::c_int) {
    let pipe = WAKE.load(Ordering::SeqCst);
    // SAFETY: errno's location is valid for the thread that runs the handler, and is restored so that
    // the interrupted code does not see write's. The byte is a valid buffer; a full pipe is as good as
    // a written one.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(pipe, [1u8].as_ptr().cast(), 1);
        *libc::__errno_location() = errno;
    }
}

/// pidfd_open(2), Linux 5.3: readable when the process has ended. `Unsupported` on older kernels, and where it is not allowed:
/// EPERM is what older seccomp profiles of container engines have for calls that they do not know.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM) => io::ErrorKind::Unsupported.into(),
            _ => error,
        });
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A child that has ended, with its exit code or 128 and the number of the signal that ended it, real-time signals included, which
/// nix has no word for. It can still be asked for, until it is [`reap`]ed. `None` if there is none.
pub fn ended() -> io::Result<Option<(Pid, i32)>> {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    match wait(libc::P_ALL, 0, options) {
        Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        info => {
            let info = info?;
            // SAFETY: waitid(2) has filled in what it knows of an end of a child, or has left zeros.
            let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
            let code = match info.si_code {
                libc::CLD_EXITED => status,
                _ => 128 + status,
            };
            Ok((pid != 0).then(|| (Pid::from_raw(pid), code)))
        }
    }
}

/// Has the kernel forget a child that has ended.
pub fn reap(pid: Pid) -> io::Result<()> {
    let id = libc::id_t::try_from(pid.as_raw()).map_err(io::Error::other)?;
    wait(libc::P_PID, id, libc::WEXITED | libc::WNOHANG).map(drop)
}

fn wait(kind: libc::idtype_t, id: libc::id_t, options: i32) -> io::Result<libc::siginfo_t> {
    // SAFETY: all zeros are a value of this plain structure, and the call writes to it alone.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        match libc::waitid(kind, id, &raw mut info, options) {
            0 => Ok(info),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Whether a process that was forked has come to run a program of its own. One that has ended can be asked until it is
/// waited for; `None` if nothing is known of it.
pub fn has_executed(pid: Pid) -> Option<bool> {
    /// `PF_FORKNOEXEC` of linux/sched.h.
    const FORKED_ONLY: u64 = 0x40;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the 9th field; the 2nd is the name, which is in brackets and may have some of its own.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let flags: u64 = after_name.split(' ').nth(6)?.parse().ok()?;
    Some(flags & FORKED_ONLY == 0)
}

/// kill(2) with any signal, the real-time ones included, which nix has no word for. `pid` must name one
/// process.
pub fn send_signal(pid: Pid, signal: i32) -> io::Result<()> {
    if pid.as_raw() <= 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the call takes plain numbers.
    match unsafe { libc::kill(pid.as_raw(), signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cloned_has_executed_nothing_yet() {
        assert_eq!(has_executed(Pid::this()), Some(true));
        let thread = std::thread::spawn(|| has_executed(nix::unistd::gettid()));
        assert_eq!(thread.join().unwrap(), Some(false));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        while crate::sys::process::is_running(child.id()) {
            std::thread::yield_now();
        }
        assert_eq!(has_executed(pid), Some(true));
        child.wait().unwrap();
        assert_eq!(has_executed(pid), None);
    }
}
