//! Plywood: container root file systems in user space.
//!
//! The map of the modules, from the ground up. Arrows point one way; a module knows only those named
//! before it.
//!
//! - [`sys`]: every `unsafe` block and every system call that nix lacks. Knows nothing of anything.
//! - [`store`]: what lies on disk below plyd's root: checksummed record files, the index over them,
//!   and layers. Knows nothing of snapshots.
//! - [`cow`]: the union of read-only lowers and one writable upper: lookup, whiteouts, copy-up,
//!   redirects, the node table. Knows nothing of FUSE; it is tested without a mount.
//! - [`fuse`]: the FUSE session: translation between the kernel's requests and [`cow`], the probe of
//!   what the kernel can do, cache policy, and the control socket of a `plyfs` process.
//! - [`snapshotter`]: the life cycle of snapshots, their records, and the supervision of one `plyfs`
//!   process for each mounted one.
//! - [`image`]: OCI images: archives, manifests, configs, and the unpacking of layers.
//! - [`runtime`]: the life cycle of containers: OCI spec, the shim that owns a container's process,
//!   logs, exec.
//! - [`grpc`]: the services that plyd offers, and the generated code of their protocols.
//! - [`cli`]: the commands of `snapctl` and what they print.
//!
//! The four programs in `src/bin` parse arguments and wire these together, nothing else.

pub mod cli;
pub mod cow;
pub mod fuse;
pub mod grpc;
pub mod image;
pub mod runtime;
pub mod snapshotter;
pub mod store;
pub mod sys;
