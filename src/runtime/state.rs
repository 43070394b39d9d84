//! What became of a container: the record that its shim keeps, and that outlives both shim and plyd.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::store::record::Record;

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Never started, or every start failed.
    #[default]
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Stopped,
}

/// The state of a container. While its shim lives only the shim writes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunState {
    /// Where it is in its life.
    pub status: Status,
    /// Process id on the host of its process; 0 unless running.
    pub pid: u32,
    /// When it was started last.
    pub started: Option<SystemTime>,
    /// When it ended.
    pub finished: Option<SystemTime>,
    /// Exit code, or 128 and the number of the signal; what a failed start should make `run` exit with.
    pub exit_code: i32,
    /// The kernel killed a process of it for want of memory.
    pub oom_killed: bool,
    /// Why it could not be started, or what went wrong with it.
    pub error: String,
}

impl Record for RunState {
    const KIND: &'static str = "container state";
    const VERSION: u32 = 1;
    const REMEDY: &'static str = "if the container runs, it is written anew when that ends; if not, restore it from a backup, or delete the file, which forgets how the container ended, and start plyd again";
}

/// The name of a [`RunState`] in its directory.
pub const STATE_RECORD: &str = "state";
