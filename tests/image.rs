//! Image archives, from the stream to the tree of a layer chain. Needs root, umoci, skopeo, mmdebstrap,
//! busybox-static and containerd.
//!
//! - `care`: what the store takes, and its repair;
//! - `damage`: views and records that are not what they were;
//! - `good`: what is accepted, and what comes of it;
//! - `hostile`: what is refused, and that nothing of it stays;
//! - `packed`: what stands on packed layers;
//! - `real`: images made by other programs, compared with what those and containerd unpack;
//! - `service`: the Images service of a running plyd, also killed in the middle;
//! - `space`: what a snapshot takes that somebody works with.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

#[path = "image/archive.rs"]
mod archive;
#[path = "image/care.rs"]
mod care;
#[path = "cli/common.rs"]
mod common;
#[path = "image/damage.rs"]
mod damage;
#[path = "image/good.rs"]
mod good;
#[path = "image/hostile.rs"]
mod hostile;
#[path = "image/packed.rs"]
mod packed;
#[path = "image/real.rs"]
mod real;
#[path = "image/service.rs"]
mod service;
#[path = "image/space.rs"]
mod space;
#[path = "image/store.rs"]
mod store;
#[path = "image/tree.rs"]
mod tree;
