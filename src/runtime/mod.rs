//! The life cycle of containers.
//!
//! A container is an OCI bundle whose root is a plyfs mount. plyd keeps its record and answers its
//! clients; one [`shim`] for each container executes the OCI runtime ([`oci`]), owns the container's
//! streams, [`log`] and [`state`], and outlives plyd. The two talk over a socket ([`wire`]).

pub mod client;
pub mod containers;
pub mod log;
pub mod lookup;
pub mod names;
pub mod oci;
pub mod shim;
pub mod signals;
pub mod spec;
pub mod state;
pub mod user;
pub mod wire;
