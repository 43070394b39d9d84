//! `plyfs` as its users meet it: through real mounts, and by its exit codes and messages.
//!
//! Every lower layer is looked at before and after: not one byte, time or attribute may differ
//! (`common::Layers` does so when it is dropped).

#[path = "common/mod.rs"]
mod common;

mod mount {
    mod attributes;
    mod caches;
    mod chunks;
    mod control;
    mod dialects;
    mod directories;
    mod files;
    mod large;
    mod mapping;
    mod modes;
    mod options;
    mod packed;
    mod passthrough;
    mod process;
    mod user;
    mod whiteouts;
}
