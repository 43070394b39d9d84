//! The services that plyd offers, all on one socket.
//!
//! Each file holds one service: it checks a request, calls the module that does the work on a thread
//! that may block, and words the answer. [`status`] is the one place where errors become gRPC codes,
//! [`server`] the one where the services meet the socket.

mod care;
mod container;
mod content;
mod damage;
mod diff;
mod filter;
mod images;
mod layer;
mod layers;
pub mod pb;
mod pieces;
mod repair;
pub mod server;
mod snapshot_admin;
mod snapshot_names;
mod snapshots;
mod space;
mod status;
mod system;
