//! The FUSE session: translation between the kernel's requests and the union, nothing else.

pub mod control;
