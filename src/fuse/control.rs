//! The control socket of a `plyfs` process: how plyd, or its successor, finds out that the process
//! lives, gets a duplicate of its FUSE descriptor, and asks it to flush or to end.
//!
//! `plyfs --control PATH` listens on a SOCK_SEQPACKET Unix socket, mode 0600. One message is one JSON object;
//! descriptors travel with SCM_RIGHTS. The end of file on a connection is the death of the process.
//! The protocol carries a version; either side refuses one that it does not know.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// What a plyfs says of itself.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Hello {
    /// Version of the protocol.
    pub version: u32,
    /// Its process id.
    pub pid: u32,
    /// `CARGO_PKG_VERSION` of its build.
    pub release: String,
    /// The kernel's INIT has been answered: the mount serves.
    pub serving: bool,
}

/// A connection to a plyfs.
pub struct ControlClient {}

#[allow(
    unused_variables,
    clippy::todo,
    missing_docs,
    reason = "signatures that the first commit agrees on"
)]
impl ControlClient {
    /// Connects to the socket at `path` and exchanges hellos within `timeout`. Paths longer than
    /// sockaddr_un allows are reached through a directory descriptor.
    pub fn connect(path: &Path, timeout: Duration) -> std::io::Result<(Self, Hello)> {
        todo!()
    }
    /// A duplicate of the /dev/fuse descriptor.
    pub fn fuse_fd(&self, timeout: Duration) -> std::io::Result<OwnedFd> {
        todo!()
    }
    /// Brings every dirty page of the mount to the upper and makes the upper durable.
    pub fn flush(&self, timeout: Duration) -> std::io::Result<()> {
        todo!()
    }
    /// Asks the process to end once the mount is gone or its descriptor is aborted.
    pub fn stop(&self, timeout: Duration) -> std::io::Result<()> {
        todo!()
    }
    /// For poll(2): readable or hung up means that the process is gone.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
}
