//! Whatever a file of the store or a stream of a layer says, the answer is a result or an error that names it: no panic, no
//! hang, no appetite for memory, no wrong data.
//!
//! Every target damages or forges sound files of a real store. A forged one has its checksums made anew, without which nothing
//! would come to the code behind them. A few seconds for each target are part of `make test`, with cases drawn by chance. `make fuzz`
//! goes on for longer, with cases that libFuzzer draws by what code they come to; `guided-run` says how.
//!
//! - `engine`: draws cases and watches over them.
//! - `seeds`: the store that is damaged, and readers of all that is in it.
//! - `formats`: indexes and views; `contents`: packs, large objects, recipes, records; `streams`: tar, gzip, zstd.
//!
//! A finding is repeated by the number of its case, `PLYWOOD_FUZZ_CASE=N cargo test --test fuzz TARGET`, and becomes a test beside the
//! code that was wrong.
#![cfg_attr(
    plywood_fuzz,
    no_main,
    allow(
        dead_code,
        reason = "libFuzzer brings its own main, and draws the cases"
    )
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on ends"
)]

#[path = "../image/archive.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod archive;
mod contents;
mod engine;
mod formats;
#[cfg(plywood_fuzz)]
mod guided;
mod seeds;
mod streams;

#[test]
fn index() {
    let target = formats::Index::new();
    engine::run("index", |choices| target.case(choices));
}

#[test]
fn view() {
    let target = formats::Views::new();
    engine::run("view", |choices| target.case(choices));
}

#[test]
fn pack() {
    let target = contents::Packs::new();
    engine::run("pack", |choices| target.case(choices));
}

#[test]
fn frames() {
    let target = contents::Frames::new();
    engine::run("frames", |choices| target.case(choices));
}

#[test]
fn recipe() {
    let target = contents::Recipe::new();
    engine::run("recipe", |choices| target.case(choices));
}

#[test]
fn record() {
    let target = contents::Records::new();
    engine::run("record", |choices| target.case(choices));
}

#[test]
fn tar() {
    let mut target = streams::Streams::new();
    engine::run("tar", |choices| target.tar_case(choices));
}

#[test]
fn compressed() {
    let mut target = streams::Streams::new();
    engine::run("compressed", |choices| target.compressed_case(choices));
}
