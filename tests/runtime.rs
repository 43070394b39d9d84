//! Containers on a real OCI runtime. Needs root, /dev/fuse, an OCI runtime (runc or crun) and
//! busybox-static.
//!
//! - `shim`: one plyshim by itself, on a root directory made by hand.
//! - `isolation`: what a process finds in a container.
//! - `crash`: plyd, plyshim and plyfs are killed.
//! - `crun`: the other OCI runtime.
//! - `ends`: what is left when a container has ended.
//! - `interrupted`: what is left of one that nobody waited for.
//! - `unexecuted`: programs that are there and cannot be executed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[path = "runtime/bench.rs"]
mod bench;
#[path = "cli/common.rs"]
mod common;
#[path = "runtime/crash.rs"]
mod crash;
#[path = "runtime/crun.rs"]
mod crun;
#[path = "runtime/ends.rs"]
mod ends;
#[path = "runtime/image.rs"]
mod image;
#[path = "runtime/interrupted.rs"]
mod interrupted;
#[path = "runtime/isolation.rs"]
mod isolation;
#[path = "runtime/shim.rs"]
mod shim;
#[path = "runtime/unexecuted.rs"]
mod unexecuted;
