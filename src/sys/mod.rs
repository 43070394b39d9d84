//! Every `unsafe` block of Plywood and every system call that nix lacks.
//!
//! Each function here is a safe wrapper of one system call or of one kernel protocol; it decides
//! nothing. Nothing here knows of any other module.
#![allow(unsafe_code, reason = "the one place for it")]

pub mod child;
pub mod dirents;
pub mod fd_passing;
pub mod flags;
pub mod fs;
pub mod fuse_mount;
pub mod fusectl;
pub mod handle;
pub mod inroot;
pub mod map;
mod mode;
pub mod mountinfo;
pub mod private_mount;
pub mod process;
pub mod spawn;
pub mod terminal;
pub mod tree;
pub mod xattr;
