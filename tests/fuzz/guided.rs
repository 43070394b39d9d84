//! The targets under libFuzzer, which draws cases by what code they come to.

use std::cell::RefCell;

use super::engine::Choices;
use super::{contents, formats, streams};

type Target = Box<dyn FnMut(&mut Choices<'_>)>;

/// The target that `PLYWOOD_FUZZ_TARGET` names.
fn target() -> Target {
    let name = std::env::var("PLYWOOD_FUZZ_TARGET").expect("PLYWOOD_FUZZ_TARGET names a target");
    match &*name {
        "index" => {
            let target = formats::Index::new();
            Box::new(move |choices| target.case(choices))
        }
        "view" => {
            let target = formats::Views::new();
            Box::new(move |choices| target.case(choices))
        }
        "pack" => {
            let target = contents::Packs::new();
            Box::new(move |choices| target.case(choices))
        }
        "frames" => {
            let target = contents::Frames::new();
            Box::new(move |choices| target.case(choices))
        }
        "recipe" => {
            let target = contents::Recipe::new();
            Box::new(move |choices| target.case(choices))
        }
        "record" => {
            let target = contents::Records::new();
            Box::new(move |choices| target.case(choices))
        }
        "tar" => {
            let mut target = streams::Streams::new();
            Box::new(move |choices| target.tar_case(choices))
        }
        "compressed" => {
            let mut target = streams::Streams::new();
            Box::new(move |choices| target.compressed_case(choices))
        }
        other => panic!("there is no target {other}"),
    }
}

thread_local! {
    static TARGET: RefCell<Target> = RefCell::new(target());
}

// A panic in any thread ends the program and keeps the case.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    TARGET.with_borrow_mut(|target| target(&mut Choices::new(bytes)));
});
