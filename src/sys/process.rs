//! What a process says of itself to the kernel: name, memory, limits, forks, inherited descriptors.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use libc::rlim_t;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{ForkResult, Pid};

/// Whether user ids here are the host's: the initial user namespace maps all of them to themselves.
pub fn in_initial_user_namespace() -> bool {
    let Ok(map) = fs::read_to_string("/proc/self/uid_map") else {
        // A kernel without user namespaces.
        return true;
    };
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// The supplementary groups of a process or thread (proc_pid_status(5)).
pub fn supplementary_groups(pid: u32) -> io::Result<Vec<u32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let groups = groups.ok_or(io::ErrorKind::InvalidData)?;
    let numbers = groups.split_whitespace().map(str::parse);
    numbers
        .collect::<Result<_, _>>()
        .map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Whether a process of that number runs; one that has ended and was not waited for does not.
pub fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    // proc(5): the state comes behind the name, which is in brackets and may have some of its own.
    let state = stat.map(|stat| stat.rsplit_once(") ")?.1.chars().next());
    match state {
        Ok(state) => !matches!(state, Some('Z' | 'X')),
        Err(error) => !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
    }
}

/// Whether this process writes into blocks that a file system keeps for root.
pub fn may_use_reserves() -> bool {
    nix::unistd::geteuid().is_root() && in_initial_user_namespace()
}

/// Lets other threads go first, those of this process too: for long work that is to be in nobody's way. For this
/// thread alone, and for good.
pub fn give_way() -> io::Result<()> {
    // Not the last: what holds a lock that others wait for has to come to an end.
    const NICE: libc::c_int = 5;
    // SAFETY: plain values. Linux takes 0 for the calling thread, not for its process.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The soft and the hard limit of open files before `raise_open_files`.
static FIRST_OPEN_FILES: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// `PR_SET_IO_FLUSHER` of `linux/prctl.h`, Linux 5.6: memory is then reclaimed for this process
/// without waiting for the file system that it serves.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Marks the process as one that memory reclaim may be waiting for. EINVAL before Linux 5.6, EPERM
/// without CAP_SYS_RESOURCE.
pub fn set_io_flusher() -> io::Result<()> {
    // SAFETY: the call takes plain numbers and touches no memory of ours.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets how readily the OOM killer takes this process, -1000 (never) to 1000.
pub fn set_oom_score_adj(score: i32) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", score.to_string())
}

/// Raises the soft limit of open files to the hard one, for this process and the programs that it starts.
pub fn raise_open_files() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let _of_an_earlier_call = FIRST_OPEN_FILES.set((soft, hard));
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// The soft and the hard limit of open files with which a process started that has raised it since.
pub fn first_open_files() -> Option<(u64, u64)> {
    FIRST_OPEN_FILES.get().copied()
}

/// `linux/capability.h`: header and data of capget(2) in the third version of its format.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Has the C library give freed memory back to the host, where it would keep it.
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bit of CAP_SYS_ADMIN.
const CAP_SYS_ADMIN: u32 = 1 << 21;

/// Bit of CAP_SYS_RESOURCE.
const CAP_SYS_RESOURCE: u32 = 1 << 24;

static CAPABILITY_HEADER: CapabilityHeader = CapabilityHeader {
    version: CAPABILITY_VERSION_3,
    pid: 0,
};

/// The capabilities of this thread.
fn capabilities() -> io::Result<[CapabilityData; 2]> {
    let mut data = [CapabilityData::default(); 2];
    // SAFETY: version 3 has a header and two sets of data, laid out as the kernel's structures; both
    // live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_capget,
            &raw const CAPABILITY_HEADER,
            data.as_mut_ptr(),
        )
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(data)
}

/// Whether this process may do what the host reserves to CAP_SYS_ADMIN of its own.
pub fn administers_the_host() -> bool {
    in_initial_user_namespace()
        && capabilities().is_ok_and(|data| data[0].effective & CAP_SYS_ADMIN != 0)
}

/// Gives CAP_SYS_RESOURCE away for good, for this thread and those that it starts later: whoever has
/// it writes beyond quotas. (Into the blocks that a file system reserves root writes without it, too.)
pub fn drop_sys_resource() -> io::Result<()> {
    let mut data = capabilities()?;
    data[0].effective &= !CAP_SYS_RESOURCE;
    data[0].permitted &= !CAP_SYS_RESOURCE;
    // SAFETY: the structures are as for capget, and the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_capset,
            &raw const CAPABILITY_HEADER,
            data.as_ptr(),
        )
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes a descriptor over that the parent left open under a number that it named.
///
/// EBADF when there is none under that number, EINVAL for the three standard streams.
pub fn adopt_fd(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: F_SETFD on any number is harmless; it fails with EBADF when nothing is open there.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and by the contract of the command line it is for this
    // process alone, which adopts it once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Descriptors that this process was started with, beside the standard streams.
#[derive(Debug)]
pub struct Inherited(Vec<RawFd>);

/// What is open beside the standard streams. To be called before anything else opens a file.
pub fn inherited() -> io::Result<Inherited> {
    const STREAMS: RangeInclusive<RawFd> = 0..=2;
    let mut numbers = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let number = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        numbers.extend(number.filter(|number| !STREAMS.contains(number)));
    }
    // The listing itself was one of them.
    // SAFETY: plain values; a closed number is EBADF.
    numbers.retain(|&number| unsafe { libc::fcntl(number, libc::F_GETFD) } != -1);
    Ok(Inherited(numbers))
}

impl Inherited {
    /// Closes them, so that whoever waits for the last one to be closed does not wait for this process.
    pub fn close(self) {
        for number in self.0 {
            // SAFETY: it was open when this program began, so nothing in it owns the descriptor but this.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
}

/// Forks. To be called while the process has one thread.
pub fn fork_single_threaded() -> io::Result<Option<Pid>> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "cannot fork with {threads} threads running"
        )));
    }
    // SAFETY: there is one thread, as was just seen, so no lock can be held by another one that
    // does not exist in the child.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn the_limit_of_open_files_from_before_it_was_raised_is_kept() {
        let first = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        raise_open_files().unwrap();
        raise_open_files().unwrap();
        let now = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(now, (first.1, first.1));
        assert_eq!(first_open_files(), Some(first));
    }

    #[test]
    fn a_process_runs_until_it_has_ended() {
        assert!(is_running(std::process::id()));
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        assert!(is_running(child.id()));
        child.kill().unwrap();
        // Not waited for yet.
        while is_running(child.id()) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!is_running(child.id()));
    }

    #[test]
    fn a_thread_gives_way_for_itself_alone() {
        let nice = || {
            let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
            let (_, after_name) = stat.rsplit_once(')').unwrap();
            // proc(5): the 19th field; the name is the second.
            let nice = after_name.split_whitespace().nth(16).unwrap();
            nice.parse::<i32>().unwrap()
        };
        let before = nice();
        let given_way = std::thread::spawn(move || {
            give_way().unwrap();
            nice()
        });
        assert_eq!(given_way.join().unwrap(), 5);
        assert_eq!(nice(), before);
    }

    #[test]
    fn only_an_open_descriptor_can_be_adopted() {
        assert_eq!(adopt_fd(1).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(
            adopt_fd(987_654).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
        let raw = fs::File::open("/proc/self/stat").unwrap().into_raw_fd();
        assert_eq!(adopt_fd(raw).unwrap().as_raw_fd(), raw);
    }
}
