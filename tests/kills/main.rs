//! kill -9 of plyd, again and again, while clients import, commit, remove and collect. What was acknowledged is there each
//! time, and in the end every file below the root has somebody who needs it.
//!
//! - `client`: one client's steps, and what it was promised.
//! - `account`: who needs which file.
//!
//! The seed of the steps and of the moments is printed; `PLYWOOD_KILLS_SEED` sets it and `PLYWOOD_KILLS` the number of deaths.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on ends"
)]

mod account;
#[path = "../image/archive.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod archive;
mod client;
#[path = "../cli/common.rs"]
mod common;
#[path = "../common/many.rs"]
mod many;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use client::{Client, Work};
use common::{PLYD, Plyd};

/// Clients that work at the same time.
const CLIENTS: u64 = 2;
/// What they do.
const STEPS: [&str; 5] = ["load", "commit", "rm", "snapshot rm", "gc"];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn plyd_can_be_killed_again_and_again_and_leaves_no_orphan() {
    let full = std::env::var_os("PLYWOOD_TEST_FULL").is_some();
    let seed = setting("PLYWOOD_KILLS_SEED", rand::random());
    let deaths = setting("PLYWOOD_KILLS", if full { 1000 } else { 50 });
    eprintln!("PLYWOOD_KILLS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let work = Arc::new(Work::new());
    let mut clients: Vec<Client> = (0..CLIENTS)
        .map(|number| Client::new(number, seed, Arc::clone(&work)))
        .collect();
    let mut plyd = Plyd::start();
    let mut death = 0;
    // Until enough was acknowledged to prove something, however slow the machine.
    while death < deaths || !STEPS.iter().all(|step| times(&clients, step) > 0) {
        death += 1;
        assert!(death < 20 * deaths, "hardly anything is ever acknowledged");
        let pid = Pid::from_raw(i32::try_from(plyd.pid()).unwrap());
        // From the start of the first step to the middle of the third or so.
        let delay = Duration::from_millis(random.random_range(0..400));
        let address = plyd.address();
        clients = std::thread::scope(|scope| {
            let address = &address;
            let at_work: Vec<_> = clients
                .into_iter()
                .map(|mut client| {
                    scope.spawn(move || {
                        client.work_until_it_fails(address);
                        client
                    })
                })
                .collect();
            std::thread::sleep(delay);
            kill(pid, Signal::SIGKILL).unwrap();
            at_work
                .into_iter()
                .map(|client| client.join().unwrap())
                .collect()
        });
        plyd.signal(Signal::SIGKILL);
        if random.random_bool(0.25) {
            die_at_start(&plyd, Duration::from_millis(random.random_range(0..60)));
        }
        plyd.launch();
        let images = plyd.json(["image", "ls", "--json"]);
        let snapshots = plyd.json(["snapshot", "ls", "--json"]);
        for client in &mut clients {
            client.check(&images, &snapshots);
            client.clear_up(&plyd, &snapshots);
        }
        let log = plyd.log();
        assert!(!log.contains("panicked"), "after death {death}: {log}");
    }
    let done = STEPS.map(|step| (step, times(&clients, step)));
    eprintln!("acknowledged in {death} lives: {done:?}");

    let verified = plyd.snapctl(["system", "verify", "--deep"]);
    assert_eq!(verified.code, 0, "{}{}", verified.stdout, verified.stderr);
    for client in &clients {
        client.check_contents(&plyd);
    }
    plyd.ok(["system", "gc"]);
    let left = plyd.ok(["system", "gc", "--dry-run", "--explain", "--quiet"]);
    assert_eq!(left, "");
    account::every_file(&mut plyd);

    // Nor is anything left of what is removed now.
    let images = plyd.ok(["image", "ls", "-q"]);
    if !images.is_empty() {
        plyd.ok(["image", "rm", "-f"].into_iter().chain(images.lines()));
    }
    for client in &mut clients {
        client.remove_all(&plyd);
    }
    plyd.ok(["system", "gc"]);
    account::every_file(&mut plyd);
}

/// How often all clients together had a step acknowledged.
fn times(clients: &[Client], step: &str) -> u64 {
    let each = clients.iter().filter_map(|client| client.done.get(step));
    each.sum()
}

/// A plyd that dies while it clears up after the one before it.
fn die_at_start(plyd: &Plyd, after: Duration) {
    let mut short_lived = Command::new(PLYD)
        .args(["--root".as_ref(), plyd.root().as_os_str()])
        .args(["--state".as_ref(), plyd.state().as_os_str()])
        .args(["--address", &plyd.address()])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after);
    short_lived.kill().unwrap();
    short_lived.wait().unwrap();
}
