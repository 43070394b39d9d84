//! What passes between our terminal or pipes and a process in a container.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

use crate::common::{BUSYBOX, PATIENCE, Plyd, until, wait_for};

fn plyd() -> Plyd {
    let plyd = Plyd::start();
    plyd.load_busybox();
    plyd
}

#[test]
fn every_byte_of_a_pipe_arrives() {
    let plyd = plyd();
    let input: Vec<u8> = (0..8_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect();
    let done = plyd.piped(["run", "--rm", "-i", BUSYBOX, "cat"], &input);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.bytes == input,
        "{} of {} bytes",
        done.bytes.len(),
        input.len()
    );

    plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sleep", "1000"]);
    let done = plyd.piped(["exec", "-i", "job", "cat"], &input);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.bytes == input,
        "{} of {} bytes",
        done.bytes.len(),
        input.len()
    );
}

#[test]
fn stdout_and_stderr_stay_apart_and_stdin_is_empty_without_i() {
    let plyd = plyd();
    let script = "cat; echo out; echo err >&2";
    let done = plyd.piped(["run", "--rm", BUSYBOX, "sh", "-c", script], b"not for it");
    assert_eq!(
        (done.code, done.stdout.as_str(), done.stderr.as_str()),
        (0, "out\n", "err\n")
    );
}

#[test]
fn what_is_no_terminal_is_not_given_as_one() {
    let plyd = plyd();
    let refused = |args: &[&str]| {
        let done = plyd.piped(args, b"exit 3\n");
        assert_eq!((done.code, &*done.stdout), (125, ""), "{args:?}");
        let words = "need a terminal on standard input";
        assert!(done.stderr.contains(words), "{}", done.stderr);
    };
    refused(&["run", "--rm", "-it", BUSYBOX, "sh"]);
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
    // Nobody's standard input is its terminal here.
    plyd.ok(["run", "-d", "-it", "--name", "job", BUSYBOX, "sh"]);
    refused(&["exec", "-it", "job", "sh"]);
    assert_eq!(plyd.ok(["exec", "-t", "job", "echo", "there"]), "there\r\n");
    let piped = plyd.piped(["exec", "-i", "job", "sh"], b"exit 3\n");
    assert_eq!(piped.code, 3, "{}", piped.stderr);
}

#[test]
fn an_open_stdin_does_not_hold_up_the_end() {
    let plyd = plyd();
    let mut child = plyd
        .command()
        .args(["run", "--rm", "-i", BUSYBOX, "sh", "-c", "exit 3"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(wait_for(&mut child).expect("it ends").code(), Some(3));
}

#[test]
fn a_process_that_does_not_read_can_still_be_signalled() {
    let plyd = plyd();
    let mut child = plyd
        .command()
        .args([
            "run",
            "--rm",
            "-i",
            BUSYBOX,
            "sh",
            "-c",
            "trap 'exit 6' INT; while :; do sleep 0.1; done",
        ])
        .stdin(File::open("/dev/zero").unwrap())
        .spawn()
        .unwrap();
    until("it runs", || !plyd.ok(["ps", "-q"]).is_empty());
    // The trap is set a moment after the container runs; a signal before that is ignored by pid 1.
    let mut status = None;
    until("it ends", || {
        kill(
            Pid::from_raw(child.id().try_into().unwrap()),
            Signal::SIGUSR1,
        )
        .unwrap();
        status = child.try_wait().unwrap();
        status.is_some() || {
            plyd.snapctl(["kill", "-s", "INT", plyd.ok(["ps", "-q"]).trim()]);
            false
        }
    });
    assert_eq!(status.unwrap().code(), Some(6));
}

#[test]
fn signals_are_forwarded() {
    let plyd = plyd();
    let script = "trap 'echo got; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = plyd
        .command()
        .args(["run", "--rm", BUSYBOX, "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).unwrap();
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((&ready[..], rest.as_str()), (&b"ready\n"[..], "got\n"));
    assert_eq!(child.wait().unwrap().code(), Some(7));
}

#[test]
fn a_pipeline_ends_when_its_reader_does() {
    let plyd = plyd();
    let line = format!(
        "{} run --rm {BUSYBOX} yes | head -n 2; echo ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_snapctl")
    );
    let mut shell = Command::new("bash");
    let output = shell
        .args(["-c", &line])
        .env("PLYWOOD_ADDRESS", plyd.address())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "y\ny\n141\n");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(plyd.ok(["ps", "-aq"]), "");
}

/// snapctl on a terminal of its own.
pub struct OnTerminal {
    child: Child,
    master: File,
    slave: OwnedFd,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl OnTerminal {
    pub fn new(plyd: &Plyd, args: &[&str]) -> Self {
        let size = Winsize {
            ws_row: 33,
            ws_col: 77,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
        // Makes it the controlling terminal, whose signals reach snapctl.
        let child = Command::new("setsid")
            .args(["--ctty", "--wait", env!("CARGO_BIN_EXE_snapctl")])
            .args(args)
            .env("PLYWOOD_ADDRESS", plyd.address())
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let master = File::from(pty.master);
        let mut reader = master.try_clone().unwrap();
        let (to, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 || to.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            master,
            slave: pty.slave,
            output,
            seen: String::new(),
        }
    }

    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    pub fn expect(&mut self, text: &str) {
        assert!(
            self.sees(text, PATIENCE),
            "waited for {text:?}, saw {:?}",
            self.seen
        );
    }

    /// Types again and again, for what a shell is not ready for is lost, until it answers.
    fn type_until(&mut self, keys: &str, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        self.type_in(keys);
        while !self.sees(text, Duration::from_millis(500)) {
            assert!(
                Instant::now() < deadline,
                "typed {keys:?}, waited for {text:?}, saw {:?}",
                self.seen
            );
            self.type_in(keys);
        }
    }

    /// Whether it writes `text`. As long as it writes anything, more is waited for.
    fn sees(&mut self, text: &str, pause: Duration) -> bool {
        while !self.seen.contains(text) {
            match self.output.recv_timeout(pause) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => return false,
            }
        }
        self.seen.clear();
        true
    }

    /// Whether the terminal echoes and edits lines itself: not in raw mode.
    fn is_cooked(&self) -> bool {
        let flags = tcgetattr(&self.slave).unwrap().local_flags;
        flags.contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }
}

#[test]
fn a_terminal_is_the_process_s_and_is_given_back() {
    let plyd = plyd();
    let mut term = OnTerminal::new(&plyd, &["run", "--rm", "-it", BUSYBOX, "sh"]);
    term.expect("# ");
    assert!(!term.is_cooked());
    term.type_in("tty; stty size\r");
    term.expect("33 77");
    plywood::sys::terminal::set_window_size(&term.slave, 44, 99).unwrap();
    // The size arrives some time after the signal.
    let mut resized = false;
    for _ in 0..200 {
        term.type_in("stty size\r");
        if term
            .output
            .recv_timeout(PATIENCE)
            .is_ok_and(|b| String::from_utf8_lossy(&b).contains("44 99"))
        {
            resized = true;
            break;
        }
    }
    assert!(resized);
    // Ctrl-C is the shell's, not ours.
    term.type_in("echo go; sleep 1000\r");
    term.expect("go\r\n");
    term.type_until("\x03", "# ");
    term.type_until("echo still; echo here\r", "still\r\nhere");
    term.type_in("exit 4\r");
    assert_eq!(wait_for(&mut term.child).expect("it ends").code(), Some(4));
    assert!(term.is_cooked());
}

#[test]
fn a_terminal_is_given_back_when_a_signal_ends_it() {
    let plyd = plyd();
    let mut term = OnTerminal::new(
        &plyd,
        &["run", "--rm", "-it", "--name", "job", BUSYBOX, "sh"],
    );
    term.expect("# ");
    assert!(!term.is_cooked());
    plyd.ok(["kill", "job"]);
    assert_eq!(
        wait_for(&mut term.child).expect("it ends").code(),
        Some(137)
    );
    assert!(term.is_cooked());
}

#[test]
fn exec_has_a_terminal_too() {
    let plyd = plyd();
    plyd.ok(["run", "-d", "--name", "job", BUSYBOX, "sleep", "1000"]);
    let mut term = OnTerminal::new(&plyd, &["exec", "-it", "job", "sh"]);
    term.expect("# ");
    term.type_in("stty size\r");
    term.expect("33 77");
    term.type_in("exit 5\r");
    assert_eq!(wait_for(&mut term.child).expect("it ends").code(), Some(5));
    assert!(term.is_cooked());
}
