//! What the tests on real mounts share: fresh layers, a mount that goes away with its guard, and
//! the proof that nothing below was changed.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod disk;
pub mod layers;
pub mod mapping;
pub mod mode;
pub mod mount;
pub mod snapshot;

pub use layers::Layers;
pub use mount::Mount;

use std::io;

/// The errno of an operation, or 0 when it succeeded.
pub fn errno<T, E: Into<io::Error>>(result: Result<T, E>) -> i32 {
    match result {
        Ok(_) => 0,
        Err(error) => error.into().raw_os_error().expect("an error of the system"),
    }
}
