//! What the kernel keeps of files is dropped when their contents are mended: whoever reads on, without opening anything anew,
//! reads what they were.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{Mmap, MmapMut};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use plywood::fuse::control::ControlClient;
use plywood::sys::fd_passing;
use serde_json::{Value, json};

use super::archive::*;
use super::common::{Done, Plyd, until};
use super::mapping;

/// Files of a layer, with the seeds and lengths of their contents, which no compression makes smaller.
const FILES: [(&str, u64, usize); 4] = [
    // In a pack.
    ("small", 1, 40 << 10),
    ("owned", 2, 30 << 10),
    // In frames, in a file of its own.
    ("large", 3, 300 << 10),
    // Of these a part is copied up when that is written.
    ("huge", 4, 4 << 20),
];

fn base() -> Layer {
    let mut layer = Layer::new();
    for (name, seed, length) in FILES {
        layer = layer.file(name, 0o644, &noise(seed, length));
    }
    layer
}

fn image() -> Vec<u8> {
    archive("whole", &[Blob::gzip(base())])
}

fn load(plyd: &Plyd, image: &[u8]) {
    let loaded = plyd.piped(["image", "load", "-q"], image);
    assert_eq!(loaded.code, 0, "{}", loaded.stderr);
}

fn repair(plyd: &Plyd, archive: &[u8]) -> Done {
    plyd.piped(["system", "repair", "-i", "-"], archive)
}

fn mount(plyd: &Plyd, key: &str) -> PathBuf {
    let mnt = plyd.dir().join(format!("mnt-{key}"));
    fs::create_dir(&mnt).unwrap();
    plyd.ok(["mount", key, mnt.to_str().unwrap()]);
    mnt
}

/// The files that contents lie in.
fn stored(plyd: &Plyd) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = ["packs", "objects"]
        .map(|dir| plyd.root().join("store").join(dir))
        .to_vec();
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => waiting.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found
}

/// How far from its end a content is damaged.
const DAMAGED_AT: usize = 2000;

/// Damages a content, of which part is copied up at most at its start, wherever it lies.
fn damage(plyd: &Plyd, content: &[u8]) {
    let tail = &content[content.len() - DAMAGED_AT..];
    for path in stored(plyd) {
        let bytes = fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(64).position(|window| window == &tail[..64]) {
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[tail[0] ^ 1], at as u64).unwrap();
            return;
        }
    }
    panic!("nothing has the content");
}

/// The content as it is read while it is damaged.
fn damaged(content: &[u8]) -> Vec<u8> {
    let mut bytes = content.to_vec();
    bytes[content.len() - DAMAGED_AT] ^= 1;
    bytes
}

fn open_to_write(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Has the kernel drop what it keeps of a file, as it may whenever it wants.
fn drop_pages(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// What is open of a file, each in a way that keeps its pages.
struct Opened {
    path: PathBuf,
    file: File,
    shared: Mmap,
    private: MmapMut,
}

impl Opened {
    fn new(path: PathBuf) -> Self {
        let file = File::open(&path).unwrap();
        let (shared, private) = (mapping::shared(&file), mapping::private(&file));
        Self {
            path,
            file,
            shared,
            private,
        }
    }

    /// Fails unless all ways lead to these bytes, also a new one.
    fn assert_reads(&self, expected: &[u8]) {
        let name = self.path.display();
        let mut read = vec![0; expected.len()];
        self.file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == expected, "{name} by the same descriptor");
        assert!(&self.shared[..] == expected, "{name} by a shared mapping");
        assert!(&self.private[..] == expected, "{name} by a private mapping");
        assert!(
            fs::read(&self.path).unwrap() == expected,
            "{name} opened again"
        );
    }
}

/// Reads a file until what was damaged of it since it was verified is what is read, and keeps that open.
fn read_damaged(path: PathBuf, expected: &[u8]) -> Opened {
    until("the damage is read", || {
        drop_pages(&File::open(&path).unwrap());
        // What is in memory plyfs forgets when it learns that nobody has the file open.
        fs::read(&path).unwrap() == expected
    });
    let opened = Opened::new(path);
    opened.assert_reads(expected);
    opened
}

/// Such a container had to be started again, and nobody but the message of the repair said so.
#[test]
fn who_has_read_what_was_damaged_reads_on_what_was_mended() {
    let plyd = Plyd::start();
    load(&plyd, &image());
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let mnt = mount(&plyd, "work");
    fs::set_permissions(mnt.join("owned"), PermissionsExt::from_mode(0o600)).unwrap();
    let huge = open_to_write(&mnt.join("huge"));
    huge.write_all_at(b"mine", 1000).unwrap();
    let whole = FILES.map(|(name, seed, length)| {
        let mut content = noise(seed, length);
        if name == "huge" {
            content[1000..1004].copy_from_slice(b"mine");
        }
        content
    });
    for ((name, seed, length), content) in FILES.into_iter().zip(&whole) {
        // From now on it is known to be what it was.
        assert!(fs::read(mnt.join(name)).unwrap() == *content, "{name}");
        damage(&plyd, &noise(seed, length));
    }
    let opened: Vec<Opened> = FILES
        .iter()
        .zip(&whole)
        .map(|((name, ..), content)| read_damaged(mnt.join(name), &damaged(content)))
        .collect();

    let mended = repair(&plyd, &image());
    assert_eq!(mended.code, 0, "{}{}", mended.stdout, mended.stderr);
    assert!(
        mended.stdout.ends_with(" 1 mended, 0 left\n") && !mended.stdout.contains("again"),
        "{}",
        mended.stdout
    );
    for (opened, content) in opened.iter().zip(&whole) {
        opened.assert_reads(content);
    }
    assert_eq!(
        plyd.json(["system", "info", "--json"])["damaged_contents"],
        0
    );
    drop((opened, huge));
    plyd.umount(&mnt);
}

/// Loading the image again once healed what was on the disk alone.
#[test]
fn who_reads_on_reads_what_loading_the_image_again_has_healed() {
    let plyd = Plyd::start();
    load(&plyd, &image());
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let mnt = mount(&plyd, "work");
    let content = noise(3, 300 << 10);
    assert!(fs::read(mnt.join("large")).unwrap() == content);
    damage(&plyd, &content);
    let opened = read_damaged(mnt.join("large"), &damaged(&content));
    // Nobody knows of it before.
    assert_eq!(plyd.snapctl(["system", "verify", "--deep"]).code, 1);
    load(&plyd, &image());
    opened.assert_reads(&content);
    drop(opened);
    plyd.umount(&mnt);
}

/// What the kernel keeps of the layer that is left may be all that there is of it, and a program that has it mapped would end.
#[test]
fn a_mount_with_a_layer_that_is_damaged_still_keeps_what_it_has_and_is_named() {
    let plyd = Plyd::start();
    let top = noise(5, 50 << 10);
    let layers = [
        Blob::gzip(base()),
        Blob::gzip(Layer::new().file("top", 0o644, &top)),
    ];
    load(&plyd, &archive("both", &layers));
    load(&plyd, &image());
    for (key, parent) in [("work", "both"), ("other", "whole")] {
        plyd.ok(["snapshot", "prepare", key, parent]);
    }
    let (work, other) = (mount(&plyd, "work"), mount(&plyd, "other"));
    let content = noise(3, 300 << 10);
    for mnt in [&work, &other] {
        assert!(fs::read(mnt.join("large")).unwrap() == content);
    }
    let top_opened = Opened::new(work.join("top"));
    top_opened.assert_reads(&top);
    damage(&plyd, &content);
    damage(&plyd, &top);
    let in_work = read_damaged(work.join("large"), &damaged(&content));
    let in_other = read_damaged(other.join("large"), &damaged(&content));
    let layer = plyd.json(["snapshot", "info", "work", "--json"])["packed_layers"][0].clone();
    let layer = layer.as_str().unwrap();

    let mended = repair(&plyd, &image());
    assert_eq!(mended.code, 1, "{}", mended.stdout);
    let told = format!(
        "left: the snapshot work: it may go on with what was read of contents while they were damaged, for its layer {layer} is damaged still; mend that, then repeat this, or mount it again, and start again what runs on it\n"
    );
    assert!(mended.stdout.contains(&told), "{}", mended.stdout);
    assert!(
        mended
            .stdout
            .contains("1 mended, 1 content of 1 layer, 1 mount left\n"),
        "{}",
        mended.stdout
    );
    in_other.assert_reads(&content);
    in_work.assert_reads(&damaged(&content));
    top_opened.assert_reads(&top);

    let mended = repair(&plyd, &archive("both", &layers));
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    in_work.assert_reads(&content);
    top_opened.assert_reads(&top);
    drop((in_work, in_other, top_opened));
    plyd.umount(&work);
    plyd.umount(&other);
}

/// The control sockets of all mounts.
fn sockets(plyd: &Plyd) -> Vec<PathBuf> {
    let places = fs::read_dir(plyd.state().join("mounts")).unwrap();
    places
        .map(|place| place.unwrap().path().join("ctl.sock"))
        .collect()
}

/// Answers on a control socket as a plyfs of an earlier release does, which knows nothing but the greeting.
fn answer_as_before(socket: &Path) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let address = UnixAddr::new(socket).unwrap();
    socket::bind(listener.as_raw_fd(), &address).unwrap();
    socket::listen(&listener, socket::Backlog::new(8).unwrap()).unwrap();
    thread::spawn(move || {
        while let Ok(connection) = fd_passing::accept(listener.as_fd()) {
            answer_all(&connection);
        }
    });
}

fn answer_all(connection: &OwnedFd) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok((length @ 1.., _)) = fd_passing::recv_with_fds(connection.as_fd(), &mut buffer) {
        let request: Value = serde_json::from_slice(&buffer[..length]).unwrap();
        let outcome = match &request["operation"] {
            Value::Object(hello) if hello.contains_key("hello") => {
                json!({"hello": {"version": 1, "pid": 1, "release": "0.0.1", "serving": true}})
            }
            other => json!({"failed": {
                "errno": libc::EOPNOTSUPP,
                "message": format!("plyfs 0.0.1 does not know the operation {other}"),
            }}),
        };
        let reply = json!({"id": request["id"], "outcome": outcome}).to_string();
        fd_passing::send_with_fds(connection.as_fd(), reply.as_bytes(), &[]).unwrap();
    }
}

#[test]
fn a_mount_of_an_earlier_release_is_named_with_what_to_do() {
    let plyd = Plyd::start();
    plyd.load_busybox();
    load(&plyd, &image());
    plyd.ok([
        "run",
        "-d",
        "--name",
        "box",
        "localhost/busybox",
        "sleep",
        "1000",
    ]);
    let socket = sockets(&plyd).remove(0);
    let own = socket.with_extension("own");
    fs::rename(&socket, &own).unwrap();
    answer_as_before(&socket);
    let repaired = |plyd: &Plyd| {
        damage(plyd, &noise(3, 300 << 10));
        repair(plyd, &image())
    };
    let mended = repaired(&plyd);
    assert_eq!(mended.code, 1, "{}{}", mended.stdout, mended.stderr);
    let told = "left: the root of the container box: it may go on with what was read of contents while they were damaged, for its plyfs does not read anew: plyfs 0.0.1 does not know the operation \"refresh\"; start it again\n";
    assert!(mended.stdout.contains(told), "{}", mended.stdout);
    assert!(
        mended.stdout.contains(" 1 mended, 1 mount left"),
        "{}",
        mended.stdout
    );
    // Nothing is said again where nothing is mended.
    assert_eq!(plyd.snapctl(["system", "repair"]).code, 0);
    fs::rename(&own, &socket).unwrap();
    let mended = repaired(&plyd);
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    plyd.ok(["rm", "-f", "box"]);
}

/// Dropping a page waits for who reads or writes it, and these wait for plyfs.
#[test]
fn what_is_dropped_while_others_read_and_write_keeps_nobody_waiting() {
    const TIME: Duration = Duration::from_secs(4);
    const LONG: Duration = Duration::from_secs(30);
    let plyd = Plyd::start();
    plyd.load_busybox();
    load(&plyd, &image());
    plyd.ok(["snapshot", "prepare", "work", "whole"]);
    let mnt = mount(&plyd, "work");
    // The pages that a program runs from go, too.
    let busy = "while ls -l /bin | grep -q busybox; do echo; done; sleep 1000";
    let run = [
        "run",
        "-d",
        "--name",
        "box",
        "localhost/busybox",
        "sh",
        "-c",
    ];
    plyd.ok(run.into_iter().chain([busy]));
    let running = AtomicBool::new(true);
    let huge = noise(4, 4 << 20);
    thread::scope(|scope| {
        let (running, mnt, huge) = (&running, &mnt, &huge);
        scope.spawn(move || {
            while running.load(Ordering::Relaxed) {
                for (name, seed, length) in &FILES[..3] {
                    assert!(fs::read(mnt.join(name)).unwrap() == noise(*seed, *length));
                }
            }
        });
        scope.spawn(move || {
            let file = File::open(mnt.join("large")).unwrap();
            let (map, whole) = (mapping::shared(&file), noise(3, 300 << 10));
            while running.load(Ordering::Relaxed) {
                assert!(map[..] == whole[..]);
            }
        });
        // A page in each chunk, so that ever more of the file is copied up.
        for by_mapping in [false, true] {
            scope.spawn(move || {
                let file = open_to_write(&mnt.join("huge"));
                let mut map = mapping::shared_mut(&file);
                let first = if by_mapping { 4096 } else { 0 };
                let mut places = (first..huge.len()).step_by(64 << 10).cycle();
                while running.load(Ordering::Relaxed) {
                    let at = places.next().unwrap();
                    let same = &huge[at..at + 10];
                    match by_mapping {
                        true => map[at..at + 10].copy_from_slice(same),
                        false => file.write_all_at(same, at as u64).unwrap(),
                    }
                    assert!(map[at..at + 4096] == huge[at..at + 4096]);
                }
            });
        }
        let sockets = sockets(&plyd);
        assert_eq!(sockets.len(), 2);
        let refresh = || {
            let start = Instant::now();
            let mut times = 0;
            while start.elapsed() < TIME {
                for socket in &sockets {
                    let (control, _) = ControlClient::connect(socket, LONG)?;
                    control.refresh(LONG)?;
                }
                times += 1;
            }
            Ok::<_, std::io::Error>(times)
        };
        let times = refresh();
        running.store(false, Ordering::Relaxed);
        assert!(times.unwrap() > 3);
    });
    let lines = |plyd: &Plyd| plyd.ok(["logs", "box"]).len();
    let before = lines(&plyd);
    until("the container goes on", || lines(&plyd) > before);
    plyd.ok(["rm", "-f", "box"]);
    assert!(fs::read(mnt.join("huge")).unwrap() == huge);
    plyd.umount(&mnt);
}
