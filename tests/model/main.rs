//! The union against a reference model.
//!
//! Random layers are written to disk and merged in memory; the same random operations then run on
//! the model and on a union of those layers, and every answer and every tree has to agree. Kernel
//! overlayfs is a subject like the others: it keeps the model honest.
//!
//! `PLYWOOD_MODEL_CASES` sets the number of cases of each property, `PLYWOOD_MODEL_OPS` the number of
//! operations of a case. A failing sequence is shrunk, printed as code, and belongs into `regressions`.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking, in its helpers too"
)]

mod differences;
mod direct;
mod jail;
mod layers;
mod model;
#[path = "../common/mounts.rs"]
mod mounts;
mod ops;
mod regressions;
mod replay;
mod stress;
mod tree;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestError, TestRunner};

use crate::replay::{Hosts, Which, replay_beside, replay_on, replay_on_both};

fn from_env(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Runs `cases` random stacks and sequences on `which`.
fn agrees_with_the_model(which: Which, foreign: bool, cases: u32) {
    agrees_on(Hosts::One, which, foreign, cases);
}

fn agrees_on(hosts: Hosts, which: Which, foreign: bool, cases: u32) {
    let config = ProptestConfig {
        cases: from_env("PLYWOOD_MODEL_CASES", cases),
        failure_persistence: None,
        max_shrink_iters: 4000,
        ..ProptestConfig::default()
    };
    let most = from_env("PLYWOOD_MODEL_OPS", 40) as usize;
    let input = (
        layers::stack(foreign),
        prop::collection::vec(ops::op(), 1..most),
    );
    TestRunner::new(config)
        .run(&input, |(stack, ops)| {
            replay_on(hosts, which, &stack, &ops).map_err(TestCaseError::fail)
        })
        .unwrap_or_else(|error| match error {
            TestError::Fail(why, (stack, ops)) => {
                panic!("{which:?}: {why}\nlayers: {stack:?}\noperations: {ops:?}")
            }
            TestError::Abort(why) => panic!("{which:?}: {why}"),
        });
}

#[test]
fn kernel_overlayfs_agrees_with_the_model() {
    agrees_with_the_model(Which::Kernel, false, 100);
}

#[test]
fn the_union_agrees_with_the_model() {
    agrees_with_the_model(Which::Direct, false, 300);
}

#[test]
fn the_union_reads_every_dialect_of_whiteouts() {
    agrees_with_the_model(Which::Direct, true, 100);
}

#[test]
fn a_mount_agrees_with_the_model() {
    agrees_with_the_model(Which::Plyfs(""), false, 100);
}

/// No OPEN requests, and writes gathered in the kernel: copy-up happens late, sizes and times are the
/// kernel's.
#[test]
fn a_mount_without_open_requests_agrees_with_the_model() {
    agrees_with_the_model(Which::Plyfs(",no_open,writeback"), false, 60);
}

/// Every lower file, however small, is copied up in chunks.
#[test]
fn a_mount_that_copies_in_chunks_agrees_with_the_model() {
    let options = ",chunk_size=4K,copy_whole=0,complete=1";
    agrees_with_the_model(Which::Plyfs(options), false, 60);
}

/// What an old kernel does.
#[test]
fn a_mount_without_kernel_features_agrees_with_the_model() {
    agrees_with_the_model(Which::Plyfs(",kernel_features=-all"), false, 60);
}

/// The same operations on the same layers, not only others of the same kind.
#[test]
fn a_mount_and_kernel_overlayfs_agree_with_each_other() {
    let config = ProptestConfig {
        cases: from_env("PLYWOOD_MODEL_CASES", 60),
        failure_persistence: None,
        max_shrink_iters: 1000,
        ..ProptestConfig::default()
    };
    let most = from_env("PLYWOOD_MODEL_OPS", 40) as usize;
    let ops = prop::collection::vec(ops::op(), 1..most);
    TestRunner::new(config)
        .run(&(layers::stack(false), ops), |(stack, ops)| {
            replay_on_both("", &stack, &ops).map_err(TestCaseError::fail)
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Two that write to the same layers, each in its own way, and two that only look at them.
fn do_not_see_each_other(which: Which, cases: u32) {
    let config = ProptestConfig {
        cases: from_env("PLYWOOD_MODEL_CASES", cases),
        failure_persistence: None,
        max_shrink_iters: 400,
        ..ProptestConfig::default()
    };
    let most = from_env("PLYWOOD_MODEL_OPS", 40) as usize;
    let ops = || prop::collection::vec(ops::op(), 1..most);
    TestRunner::new(config)
        .run(
            &(layers::stack(false), ops(), ops()),
            |(stack, one, two)| {
                replay_beside(which, &stack, [&one, &two]).map_err(TestCaseError::fail)
            },
        )
        .unwrap_or_else(|error| panic!("{which:?}: {error}"));
}

#[test]
fn unions_of_the_same_layers_do_not_see_each_other() {
    do_not_see_each_other(Which::Direct, 40);
}

#[test]
fn mounts_of_the_same_layers_do_not_see_each_other() {
    do_not_see_each_other(Which::Plyfs(",chunk_size=4K,copy_whole=0"), 10);
}

/// Inode numbers of two host file systems, whose own numbers collide.
#[test]
fn the_union_of_layers_on_two_file_systems_agrees_with_the_model() {
    agrees_on(Hosts::Two, Which::Direct, false, 100);
}

#[test]
fn a_mount_of_layers_on_two_file_systems_agrees_with_the_model() {
    agrees_on(Hosts::Two, Which::Plyfs(""), false, 30);
}
