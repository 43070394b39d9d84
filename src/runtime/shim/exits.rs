//! The ends of processes.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use nix::unistd::Pid;

use super::conn::Role;
use super::process::End;
use super::server::{Phase, Shim, complain};
use crate::runtime::state::Status;
use crate::runtime::wire::Reply;
use crate::sys::child::{self, has_executed};

impl Shim {
    /// Waits for every child that has ended.
    pub(super) fn reap(&mut self) {
        // Fails only where there is no such call.
        while let Ok(Some((pid, code))) = child::ended() {
            let executed = has_executed(pid).unwrap_or(true);
            // Nothing more can be asked of it then.
            if let Err(error) = child::reap(pid) {
                complain(&format!("cannot wait for the process {pid}: {error}"));
                break;
            }
            let end = End { code, executed };
            if self.job_ended(pid.as_raw(), code) || self.process_ended(pid, end) {
                continue;
            }
            self.unclaimed.insert(pid.as_raw(), end);
        }
        if self.all_claimed() {
            // Descendants that the container orphaned to us.
            self.unclaimed.clear();
        }
    }

    fn process_ended(&mut self, pid: Pid, end: End) -> bool {
        let mut processes = std::iter::once(&mut self.main).chain(self.execs.values_mut());
        match processes.find(|process| process.pid == Some(pid) && process.end.is_none()) {
            Some(process) => {
                process.end = Some(end);
                process.pidfd = None;
                true
            }
            None => false,
        }
    }

    /// Does what the end of a process calls for, once its output has been read.
    pub(super) fn settle_ends(&mut self) {
        let ended: Vec<_> = self
            .execs
            .iter()
            .filter(|(_, process)| process.starting.is_none())
            .filter_map(|(&id, process)| Some((id, process.end?.code)))
            .collect();
        for (id, code) in ended {
            self.drain(Some(id));
            let drained = self
                .execs
                .get(&id)
                .is_none_or(|process| process.streams.outputs_closed());
            if drained {
                self.execs.remove(&id);
                self.tell_exec_end(id, code);
            }
        }
        let Some(End { code, .. }) = self.main.end else {
            return;
        };
        if self.phase == Phase::Running {
            self.drain(None);
            self.state.status = Status::Stopped;
            self.state.pid = 0;
            self.state.exit_code = code;
            self.state.oom_killed = self.oom_file.as_ref().is_some_and(oom_kills);
            self.state.finished = Some(SystemTime::now());
            self.save();
            self.phase = Phase::Ended;
            self.delete();
        } else if matches!(self.phase, Phase::Ended | Phase::Gone) {
            self.drain(None);
        }
    }

    fn tell_exec_end(&mut self, id: u64, code: i32) {
        let role = Role::Exec { id };
        let client = self.conns.iter().find(|(_, conn)| conn.role == role);
        let Some(conn) = client.map(|(&conn, _)| conn) else {
            return;
        };
        let reply = Reply::Exit {
            code,
            oom_killed: false,
            finished: SystemTime::now(),
        };
        self.answer(conn, &reply, Role::Idle);
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.closing = true;
        }
    }
}

/// The file that counts OOM kills in the process's cgroup: `memory.oom_control` of v1, `memory.events`
/// of v2.
pub(super) fn find_oom_file(pid: Pid) -> Option<PathBuf> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let path_of = |wanted: &dyn Fn(&str) -> bool| {
        cgroups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            wanted(parts.next()?).then(|| parts.next().map(str::to_owned))?
        })
    };
    let has_memory = |list: &str| list.split(',').any(|name| name == "memory");
    if let (Some(path), Some(mount)) = (
        path_of(&has_memory),
        mount_point(&mounts, "cgroup", Some("memory")),
    ) {
        return Some(PathBuf::from(format!("{mount}{path}/memory.oom_control")));
    }
    let path = path_of(&str::is_empty)?;
    let mount = mount_point(&mounts, "cgroup2", None)?;
    Some(PathBuf::from(format!("{mount}{path}/memory.events")))
}

fn mount_point(mounts: &str, kind: &str, option: Option<&str>) -> Option<String> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let matches = after.next()? == kind
            && option.is_none_or(|option| {
                let options = after.nth(1).unwrap_or_default();
                options.split(',').any(|one| one == option)
            });
        matches.then(|| before.split(' ').nth(4).map(str::to_owned))?
    })
}

fn oom_kills(file: &PathBuf) -> bool {
    // The cgroup may be gone with its last process; then nothing is known, and nothing is claimed.
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.strip_prefix("oom_kill "))
        .any(|count| count.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_mounts_are_told_apart() {
        let mounts = "30 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      31 25 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 25 0:29 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n";
        let v1 = mount_point(mounts, "cgroup", Some("memory"));
        assert_eq!(v1.as_deref(), Some("/sys/fs/cgroup/memory"));
        let v2 = mount_point(mounts, "cgroup2", None);
        assert_eq!(v2.as_deref(), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point(mounts, "cgroup", Some("pids")), None);
    }
}
