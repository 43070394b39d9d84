//! plyfs as plyd runs it: on a mount that is there already, with a control socket.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, umount2};
use plywood::fuse::control::ControlClient;
use plywood::sys::fuse_mount::{self, MountOptions};

use crate::common::mode;
use crate::common::mount::{unmount, wait_until};
use crate::common::{Layers, mapping};

const SOON: Duration = Duration::from_secs(60);

/// A mount made by the test, served by a child that inherited its descriptor.
struct Served {
    layers: Layers,
    child: Child,
    device: Option<OwnedFd>,
}

impl Served {
    fn new(more: &str) -> Self {
        Self::started_by(mode::plyfs(), more)
    }

    fn started_by(mut plyfs: Command, more: &str) -> Self {
        let layers = Layers::new(1);
        let device = fuse_mount::mount(&layers.mnt(), &MountOptions::default()).unwrap();
        fcntl(&device, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let child = plyfs
            .args([
                "-o",
                &format!(
                    "{},{},{more}",
                    mode::Mode::of_run().options_before(more),
                    layers.options()
                ),
            ])
            .args(["--fuse-fd", &device.as_raw_fd().to_string(), "--control"])
            .arg(layers.path("control"))
            .arg(layers.mnt())
            .env("PLYFS_LOG", "error")
            .spawn()
            .unwrap();
        Self {
            layers,
            child,
            device: Some(device),
        }
    }

    fn connect(&self) -> ControlClient {
        let path = self.layers.path("control");
        let mut client = None;
        assert!(wait_until(|| {
            client = ControlClient::connect(&path, SOON).ok();
            client.is_some()
        }));
        let (client, _) = client.unwrap();
        assert!(wait_until(|| client.hello(SOON).unwrap().serving));
        client
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Gone already in some tests.
        let _ = umount2(&self.layers.mnt(), MntFlags::MNT_DETACH);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_says_who_it_is_and_gives_its_device() {
    let served = Served::new("");
    let client = served.connect();
    let hello = client.hello(SOON).unwrap();
    assert_eq!(hello.pid, served.child.id());
    assert_eq!(hello.release, env!("CARGO_PKG_VERSION"));
    let device = client.fuse_fd(SOON).unwrap();
    let target = fs::read_link(format!("/proc/self/fd/{}", device.as_raw_fd())).unwrap();
    assert_eq!(target.to_str(), Some("/dev/fuse"));
    let second = served.connect();
    second.hello(SOON).unwrap();
    client.hello(SOON).unwrap();
    fs::write(served.layers.mnt().join("f"), "served").unwrap();
}

#[test]
fn a_flush_brings_dirty_pages_to_the_upper() {
    for options in ["", "writeback", "no_open,writeback"] {
        let served = Served::new(options);
        let client = served.connect();
        let path = served.layers.mnt().join("f");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.write_all(&[b'w'; 8192]).unwrap();
        let mut map = mapping::shared_mut(&file);
        map[5000] = b'm';
        client.flush(SOON).unwrap();
        let below = fs::read(served.layers.upper().join("f")).unwrap();
        assert_eq!(below.len(), 8192, "{options}");
        assert_eq!((below[0], below[5000]), (b'w', b'm'), "{options}");
    }
}

#[test]
fn it_ends_with_the_mount_although_its_device_is_held() {
    let mut served = Served::new("");
    let client = served.connect();
    client.stop(SOON).unwrap();
    fs::write(served.layers.mnt().join("f"), "still served").unwrap();
    unmount(&served.layers.mnt());
    assert!(wait_until(|| served.child.try_wait().unwrap().is_some()));
    assert!(client.hello(SOON).is_err());
    assert!(!served.layers.path("control").exists());
    assert!(served.device.is_some());
}

#[test]
fn its_death_is_the_end_of_the_connection_and_frees_its_clients() {
    let mut served = Served::new("");
    let client = served.connect();
    served.child.kill().unwrap();
    served.child.wait().unwrap();
    let error = client.hello(SOON).unwrap_err();
    assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
    // Whoever holds the device decides what becomes of the mount: letting go ends it.
    served.device = None;
    let path = served.layers.mnt().join("f");
    let errno = fs::metadata(path).unwrap_err().raw_os_error().unwrap();
    assert!([libc::ENOTCONN, libc::ECONNABORTED].contains(&errno));
}

/// Whoever ends a mount below plyd once waited for everything that the host had to write, and killed plyfs after 5 seconds.
#[test]
fn its_end_waits_for_no_disk() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("calls");
    let plyfs = mode::plyfs();
    let mut traced = Command::new("strace");
    traced
        .args(["-f", "-qq", "-e", "trace=syncfs,fsync", "-o"])
        .arg(&log)
        .arg(plyfs.get_program())
        .args(plyfs.get_args());
    let mut served = Served::started_by(traced, "");
    let client = served.connect();
    fs::write(served.layers.mnt().join("f"), "x").unwrap();
    client.stop(SOON).unwrap();
    unmount(&served.layers.mnt());
    assert!(wait_until(|| served.child.try_wait().unwrap().is_some()));
    let calls = fs::read_to_string(&log).unwrap();
    assert!(!calls.contains("sync"), "{calls}");
}
