//! The union: read-only lowers merged below one writable upper, in user space.

pub mod types;
pub mod union;

pub use types::*;
pub use union::Union;
