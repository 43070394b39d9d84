//! plyfs in the place of fuse-overlayfs and of kernel overlayfs: by the options, by what lies on disk, and below
//! the programs that call a mount program. fuse-overlayfs and the kernel are run beside it as peers.

#[path = "../common/mod.rs"]
#[allow(unused_imports, reason = "each test program uses a part of it")]
mod common;

mod engines;
mod fstab;
mod kernel;
mod owners;
mod peer;
mod uppers;
