//! Image archives, from the stream to the tree of a layer chain. Needs root, umoci, skopeo, mmdebstrap,
//! busybox-static and containerd.
//!
//! - `care`: the store's repair;
//! - `damage`: views and records that are not what they were;
//! - `disks`: views on a disk that is full or read-only;
//! - `gone`: records that are gone when plyd starts;
//! - `good`: what is accepted, and what comes of it;
//! - `healed`: what comes whole with something else, or because somebody put it back;
//! - `hostile`: what is refused, and that nothing of it stays;
//! - `killed`: kills of plyd while it brings good copies of what is damaged;
//! - `lost`: what containers do whose image has lost files;
//! - `missed`: records of layers that are gone when plyd starts;
//! - `packed`: what stands on packed layers;
//! - `pages`: what the kernel keeps of what was damaged;
//! - `real`: images made by other programs, compared with what those and containerd unpack;
//! - `records`: records that are made anew;
//! - `service`: the Images service of a running plyd, also killed in the middle;
//! - `space`: what the store takes;
//! - `told`: what a user is told of damage;
//! - `twins`: records that are put back beside others of the same snapshot, and what may build on one that cannot be used;
//! - `unusable`: what a user is told of records that cannot be used.
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
#[path = "image/disks.rs"]
mod disks;
#[path = "image/gone.rs"]
mod gone;
#[path = "image/good.rs"]
mod good;
#[path = "image/healed.rs"]
mod healed;
#[path = "image/hostile.rs"]
mod hostile;
#[path = "image/killed.rs"]
mod killed;
#[path = "image/lost.rs"]
mod lost;
#[path = "common/mapping.rs"]
#[allow(dead_code, reason = "others use the rest")]
mod mapping;
#[path = "image/missed.rs"]
mod missed;
#[path = "image/packed.rs"]
mod packed;
#[path = "image/pages.rs"]
mod pages;
#[path = "image/real.rs"]
mod real;
#[path = "image/records.rs"]
mod records;
#[path = "image/service.rs"]
mod service;
#[path = "image/space.rs"]
mod space;
#[path = "image/store.rs"]
mod store;
#[path = "image/told.rs"]
mod told;
#[path = "image/tree.rs"]
mod tree;
#[path = "image/twins.rs"]
mod twins;
#[path = "image/unusable.rs"]
mod unusable;
