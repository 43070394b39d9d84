//! One plyshim by itself.

use std::os::unix::fs::symlink;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use plywood::runtime::client::Error;
use plywood::runtime::state::Status;
use plywood::runtime::wire::{Reply, Request, Window};

use crate::bench::{Bench, collect, process};

fn shell(script: &str) -> [&str; 3] {
    ["/bin/sh", "-c", script]
}

#[tokio::test]
async fn the_log_has_all_output_and_the_end_is_told() {
    let bench = Bench::new(
        &shell("echo out; echo err >&2; printf partial; exit 7"),
        false,
        false,
    );
    assert_eq!(bench.run().await, 7);
    let log = bench.log();
    assert_eq!(
        (log.stdout().as_str(), log.stderr().as_str()),
        ("out\npartial", "err\n")
    );
    bench.gone().await;
}

#[tokio::test]
async fn a_signal_s_exit_code_is_128_and_its_number() {
    let bench = Bench::new(&["/bin/sleep", "1000"], false, false);
    bench.launch().await;
    bench.start().await.unwrap();
    let mut waiter = bench.connect().await;
    waiter.send(&Request::Wait).await.unwrap();
    bench
        .connect()
        .await
        .ask(&Request::Signal { signal: 9 })
        .await
        .unwrap();
    assert!(matches!(
        waiter.hear().await.unwrap(),
        Reply::Exit { code: 137, .. }
    ));
    bench.gone().await;
}

#[tokio::test]
async fn a_missing_program_is_127_and_the_shim_can_try_again() {
    for (program, code) in [
        ("/nosuch", 127),
        ("nosuch", 127),
        ("/etc", 126),
        ("/etc/passwd", 126),
    ] {
        let bench = Bench::new(&[program], false, false);
        bench.launch().await;
        match bench.start().await.unwrap_err() {
            Error::Refused { exit_code, message } => assert_eq!(exit_code, code, "{message}"),
            other => panic!("{other}"),
        }
        let mut client = bench.connect().await;
        match client.ask(&Request::State).await.unwrap() {
            Reply::State(state) => {
                assert_eq!((state.status, state.exit_code), (Status::Created, code));
                assert!(!state.error.is_empty());
            }
            other => panic!("{other:?}"),
        }
        client.ask(&Request::Shutdown).await.unwrap();
        bench.gone().await;
        assert!(!bench.config.runtime_root.join(&bench.config.id).exists());
    }
}

#[tokio::test]
async fn megabytes_go_through_without_a_lost_byte() {
    let bench = Bench::new(&["/bin/cat"], false, true);
    bench.launch().await;
    let attach = Request::Attach { stdin: true };
    let (_, mut reader, mut writer) = bench.connect().await.open(&attach).await.unwrap();
    bench.start().await.unwrap();
    let input: Vec<u8> = (0..20_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let sent = input.clone();
    let sender = tokio::spawn(async move {
        writer.send_input(&sent).await.unwrap();
        writer.send(&Request::CloseStdin).await.unwrap();
        writer
    });
    let collected = collect(&mut reader).await;
    assert_eq!(collected.exit, Some(0));
    assert!(
        collected.stdout == input,
        "{} of {} bytes",
        collected.stdout.len(),
        input.len()
    );
    sender.await.unwrap();
}

#[tokio::test]
async fn a_terminal_has_the_size_it_is_given() {
    let script =
        "stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.1; done";
    let bench = Bench::new(&shell(script), true, true);
    bench.launch().await;
    let attach = Request::Attach { stdin: true };
    let (_, mut reader, mut writer) = bench.connect().await.open(&attach).await.unwrap();
    let window = Some(Window {
        rows: 33,
        columns: 77,
    });
    bench
        .connect()
        .await
        .ask(&Request::Start { window })
        .await
        .unwrap();
    let mut seen = String::new();
    while !seen.contains("ready") {
        let frame = reader.next_frame().await.unwrap().unwrap();
        let plywood::runtime::wire::Frame::Data(bytes) = frame else {
            panic!("{frame:?}")
        };
        let record = plywood::runtime::log::parse(&bytes).unwrap();
        seen.push_str(&String::from_utf8(record.data).unwrap());
    }
    assert!(seen.contains("33 77"), "{seen}");
    writer
        .send(&Request::Resize(Window {
            rows: 11,
            columns: 44,
        }))
        .await
        .unwrap();
    let rest = collect(&mut reader).await;
    assert!(rest.stdout().contains("11 44"), "{}", rest.stdout());
    assert_eq!(rest.exit, Some(3));
}

#[tokio::test]
async fn an_exec_has_its_own_streams_and_exit_code() {
    let bench = Bench::new(&["/bin/sleep", "1000"], false, false);
    bench.launch().await;
    bench.start().await.unwrap();
    let exec = |args: &[&str], tty, stdin| Request::Exec {
        process: process(args, tty),
        stdin,
        window: None,
    };
    let request = exec(&shell("cat; echo err >&2; exit 5"), false, true);
    let (_, mut reader, mut writer) = bench.connect().await.open(&request).await.unwrap();
    writer.send_input(b"hello").await.unwrap();
    writer.send(&Request::CloseStdin).await.unwrap();
    let end = collect(&mut reader).await;
    assert_eq!(
        (end.stdout().as_str(), end.stderr().as_str(), end.exit),
        ("hello", "err\n", Some(5))
    );

    let request = exec(&["tty"], true, false);
    let (_, mut reader, _writer) = bench.connect().await.open(&request).await.unwrap();
    let end = collect(&mut reader).await;
    assert!(end.stdout().starts_with("/dev/pts/"), "{}", end.stdout());

    match bench
        .connect()
        .await
        .open(&exec(&["nosuch"], false, false))
        .await
        .unwrap_err()
    {
        Error::Refused { exit_code, .. } => assert_eq!(exit_code, 127),
        other => panic!("{other}"),
    }
    // An exec ends with its container.
    let request = exec(&["/bin/sleep", "1000"], false, false);
    let (_, mut reader, _writer) = bench.connect().await.open(&request).await.unwrap();
    bench
        .connect()
        .await
        .ask(&Request::Signal { signal: 9 })
        .await
        .unwrap();
    assert_eq!(collect(&mut reader).await.exit, Some(137));
    assert!(bench.log().stdout.is_empty());
    bench.gone().await;
}

#[tokio::test]
async fn a_slow_client_delays_nobody_and_loses_nothing() {
    let bench = Bench::new(
        &shell("head -c 4000000 /dev/zero; echo done >&2"),
        false,
        false,
    );
    bench.launch().await;
    let attach = Request::Attach { stdin: false };
    let (_, mut slow, _slow) = bench.connect().await.open(&attach).await.unwrap();
    let (_, mut quick, _quick) = bench.connect().await.open(&attach).await.unwrap();
    let mut waiter = bench.connect().await;
    waiter.send(&Request::Wait).await.unwrap();
    bench.start().await.unwrap();
    assert!(matches!(
        waiter.hear().await.unwrap(),
        Reply::Exit { code: 0, .. }
    ));
    for reader in [&mut quick, &mut slow] {
        let end = collect(reader).await;
        assert_eq!(
            (end.stdout.len(), end.stderr().as_str(), end.exit),
            (4_000_000, "done\n", Some(0))
        );
    }
}

/// A small file system that goes away with its guard.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(dir: std::path::PathBuf) -> Self {
        std::fs::create_dir(&dir).unwrap();
        let this = Self(dir);
        this.resize("size=1m", MsFlags::empty());
        this
    }

    fn resize(&self, size: &str, flags: MsFlags) {
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), flags, Some(size)).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _gone = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_makes_output_wait_and_loses_none() {
    let bench = Bench::new(
        &shell("head -c 3000000 /dev/zero; echo done >&2"),
        false,
        false,
    );
    let small = Small::mount(bench.config.dir.join("small"));
    symlink("small/log", bench.log_path()).unwrap();
    bench.launch().await;
    let mut waiter = bench.connect().await;
    waiter.send(&Request::Wait).await.unwrap();
    bench.start().await.unwrap();
    let complaints = bench.config.run_dir.join("shim.log");
    while !std::fs::read_to_string(&complaints)
        .unwrap()
        .contains("the log waits")
    {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    small.resize("size=16m", MsFlags::MS_REMOUNT);
    assert!(matches!(
        waiter.hear().await.unwrap(),
        Reply::Exit { code: 0, .. }
    ));
    let log = bench.log();
    assert_eq!(
        (log.stdout.len(), log.stderr().as_str()),
        (3_000_000, "done\n")
    );
    bench.gone().await;
}
