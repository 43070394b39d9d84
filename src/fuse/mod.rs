//! The FUSE session: translation between the kernel's requests and the union, nothing else.
//!
//! [`session`] has one method for each request. [`policy`] is what a connection agrees with the
//! kernel on, out of the optional [`features`] of the protocol; [`options`] reads what the user
//! wants. The kernel may keep everything it is told for good, because this process alone changes the
//! tree. Of what the kernel itself keeps back, dirty pages, [`seek`] and [`server`] bring down what
//! somebody is about to look at from below; [`server`] also has it drop what it was told of packed layers that were
//! mended since. What it reads by itself, from files of lower layers, is kept account of by [`passing`].

mod claims;
pub mod control;
pub mod convert;
pub mod daemon;
pub mod features;
pub mod handles;
pub mod log;
mod long;
mod opens;
pub mod options;
pub mod passing;
pub mod policy;
pub mod probe;
mod repeats;
pub mod seek;
pub mod server;
pub mod session;
