//! snapctl against a real plyd: every command, what it prints, and what it exits with.

mod common;

mod containers;
mod images;
mod layers;
mod mounts;
mod snapshots;
mod stdio;
mod usage;
