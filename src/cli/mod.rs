//! The commands of `snapctl` and what they print.
//!
//! One file holds one group of commands: its arguments (which are also its `--help`), the calls it
//! makes, and the shape of what it prints. What several groups share lies beside them: [`client`]
//! reaches plyd, [`error`] turns every failure into one sentence and an exit code, [`output`] prints
//! tables and JSON, [`stdio`] carries a process's streams, [`terminal`] the local terminal.
//!
//! The JSON that `--json` prints is an interface: fields are added, never renamed or removed.
//! `docs/snapctl.md` documents it.

pub mod app;
mod archive;
mod args;
mod client;
mod container;
mod error;
mod exec;
mod image;
mod layer;
mod mount;
mod output;
mod progress;
mod run;
mod signals;
mod snapshot;
mod stdio;
mod system;
mod terminal;
mod time;
mod tree;
pub mod usage;
