//! Containers on a real OCI runtime. Needs root, an OCI runtime (runc or crun) and busybox-static.
//!
//! - `shim`: one plyshim by itself, on a root directory made by hand.

#[path = "runtime/bench.rs"]
mod bench;
#[path = "runtime/shim.rs"]
mod shim;
