//! Snapshots on real mounts, through a real plyd. Needs root and /dev/fuse.
//!
//! - `apply`: deaths of plyd while it takes in a layer.
//! - `service`: containerd's service, and what the owners of snapshots cannot do to each other.
//! - `crash`: deaths of plyfs and plyd.
//! - `damage`: damage of what lies on disk.
//! - `commit`: deaths of both in the middle of a commit.
//! - `daemon`: plyd as a program: command line, configuration, socket, signals.
//! - `contrib`: the configurations for containerd.
//! - `links`: hard links over several commits.
//! - `readers`: what Usage, Diff and Commit see of a mount in use.
//! - `standard`: what gRPC itself defines, health and reflection.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on ends"
)]

mod apply;
#[path = "../image/archive.rs"]
#[allow(dead_code, reason = "other test programs use the rest of it")]
mod archive;
mod client;
mod commit;
#[path = "../cli/common.rs"]
mod common;
mod contrib;
mod crash;
mod daemon;
mod damage;
mod links;
#[path = "../common/mapping.rs"]
#[allow(dead_code, reason = "other test programs use the rest of it")]
mod mapping;
mod readers;
mod service;
mod standard;
