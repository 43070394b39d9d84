//! What is damaged: a store with layers that have one of everything.

use std::fs;
use std::path::{Path, PathBuf};

use plywood::store::ingest::{Limits, Settings};
use plywood::store::layer::index::{Action, LayerIndex};
use plywood::store::layers::{Expected, Layers};
use plywood::store::view::{Verify, View};
use plywood::store::{Error, LayerName, Result};
use tempfile::TempDir;

use super::archive::{Layer, head};

/// In memory where there is such a directory, for a case that opens a store syncs it; elsewhere if TMPDIR says so.
pub fn directory() -> TempDir {
    let shm = Path::new("/dev/shm");
    let within = match std::env::var_os("TMPDIR") {
        Some(dir) => PathBuf::from(dir),
        None if shm.is_dir() => shm.to_owned(),
        None => std::env::temp_dir(),
    };
    tempfile::Builder::new()
        .prefix("ply-fuzz-")
        .tempdir_in(within)
        .unwrap()
}

/// Small, so that short contents become files of their own and bombs are found out soon.
pub fn settings() -> Settings {
    Settings {
        small: 600,
        workers: 1,
        memory: 4 << 20,
        limits: Limits {
            bytes: 1 << 20,
            entries: 2000,
            names: 64 << 10,
            ..Limits::default()
        },
        ..Settings::default()
    }
}

pub struct Store {
    dir: TempDir,
    /// The lowest first.
    pub chain: Vec<LayerName>,
    pub streams: Vec<Vec<u8>>,
}

impl Store {
    pub fn new() -> Self {
        let dir = directory();
        let (layers, _) = Layers::open(dir.path(), settings()).unwrap();
        let streams = vec![below().tar(), above().tar()];
        let chain: Vec<_> = streams
            .iter()
            .map(|stream| {
                layers
                    .import(stream.as_slice(), &Expected::default(), &())
                    .unwrap()
            })
            .collect();
        layers.view(&chain, Verify::First).unwrap();
        Self {
            dir,
            chain,
            streams,
        }
    }

    pub fn open(&self) -> Layers {
        let (layers, damaged) = Layers::open(self.dir.path(), settings()).unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        layers
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The files of a directory of the store.
    pub fn files(&self, of: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path().join(of)).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }
}

fn xattr(layer: Layer, value: &[u8]) -> Layer {
    layer.pax(&[
        (b"SCHILY.xattr.user.name", value),
        (
            b"SCHILY.xattr.security.capability",
            b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ),
        (b"atime", b"1600000001.5"),
    ])
}

/// Like `seq`, so that it is compressed.
pub fn text(lines: usize) -> Vec<u8> {
    (0..lines)
        .flat_map(|line| format!("{line}\n").into_bytes())
        .collect()
}

fn below() -> Layer {
    let mut layer = Layer::new()
        .dir("usr", 0o755)
        .dir("usr/bin", 0o755)
        .symlink("bin", "usr/bin")
        .file("bin/sh", 0o755, &text(400))
        .hardlink("bin/bash", "usr/bin/sh", 0o755)
        .file("etc/empty", 0o600, b"")
        .file("etc/passwd", 0o644, b"root:x:0:0::/root:/bin/sh\n")
        .device("dev/null", b'3', (1, 3))
        .device("dev/sda", b'4', (8, 0))
        .header(&head(b"run/fifo", b'6'))
        .symlink("loop", "loop")
        .file(&format!("long/{}", "name/".repeat(30)), 0o644, &text(20));
    layer = xattr(layer, b"value").file("usr/bin/ping", 0o4755, &text(50));
    layer = layer
        .pax(&[
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"sparse/new"),
            (b"GNU.sparse.realsize", b"100000"),
        ])
        .file("sparse/x", 0o644, &{
            let mut data = b"2\n4096\n10\n50000\n5\n".to_vec();
            data.resize(512, 0);
            data.extend_from_slice(b"0123456789abcde");
            data
        });
    layer = layer
        .pax(&[
            (b"GNU.sparse.size", b"9000"),
            (b"GNU.sparse.map", b"0,4,8000,4"),
        ])
        .file("sparse/old", 0o644, b"aaaabbbb");
    for number in 0..60 {
        layer = layer.file(&format!("many/{number}"), 0o644, &text(number * 7));
    }
    layer
}

fn above() -> Layer {
    let layer = Layer::new()
        .file("etc/.wh.empty", 0o600, b"")
        .file("many/.wh..wh..opq", 0o600, b"")
        .file("many/only", 0o644, b"one")
        .hardlink("copy", "bin/sh", 0o700)
        .file("dev", 0o644, b"a file now")
        .dir("bin/new", 0o700)
        .file("bin/new/file", 0o644, &text(300))
        .file("made/on/the/way", 0o644, b"");
    xattr(layer, &[7; 300]).dir("usr", 0o700)
}

/// All that can be read of an index, as one text.
pub fn read_index(index: &LayerIndex) -> Result<String> {
    let mut seen = format!("{:?} {}\n", index.diff_id(), index.tar_bytes());
    for number in 0..index.object_count() {
        seen += &format!("{:?}\n", index.object(number)?);
    }
    for number in 0..index.len() {
        let entry = index.entry(number)?;
        let path = index.path(entry.path)?;
        seen += &format!("{:?} {path:?}", entry);
        seen += &format!(" {:?}", index.xattrs(entry.inode.xattrs)?);
        let link = entry.action == Action::Link || entry.inode.kind() == libc::S_IFLNK;
        if link {
            seen += &format!(" {:?}", index.target(&entry.inode)?);
        } else if entry.inode.kind() == libc::S_IFREG {
            seen += &format!(" {:?}", index.extents(&entry.inode)?);
        }
        seen.push('\n');
    }
    Ok(seen)
}

/// How much is looked at of a view, which may go in a circle, and of a file, which may claim any size.
const MOST_ENTRIES: usize = 2000;
const MOST_READ: u64 = 64 << 10;

/// All that can be read of a view, as one text.
pub fn read_view(view: &View) -> Result<String> {
    let mut seen = String::new();
    let mut waiting = vec![View::ROOT];
    let mut count = 0;
    while let Some(number) = waiting.pop() {
        let inode = view.inode(number)?;
        seen += &format!("{number} {inode:?} {:?}", view.xattrs(&inode)?);
        match inode.kind() {
            libc::S_IFDIR => {
                for place in 0.. {
                    let Some(entry) = view.nth(&inode, place)? else {
                        break;
                    };
                    count += 1;
                    if count > MOST_ENTRIES {
                        return Ok(seen);
                    }
                    let name = entry.name;
                    assert!(!name.is_empty() && !name.contains(&b'/') && !name.contains(&0));
                    // It is found by its name, unless the order is wrong.
                    let found = view.lookup(&inode, entry.name)?;
                    let _layer = view.layer(entry.layer)?;
                    seen += &format!(" {entry:?} {found:?}");
                    waiting.push(entry.inode);
                }
                assert_eq!(view.lookup(&inode, b"\xff\xffnot there")?, None);
            }
            libc::S_IFLNK => seen += &format!(" {:?}", view.target(&inode)?),
            libc::S_IFREG => seen += &read_file(view, number)?,
            _ => {}
        }
        if count < 4 {
            seen += &format!(" {:?}", view.path_of(number)?);
        }
        seen.push('\n');
    }
    Ok(seen)
}

fn read_file(view: &View, number: u32) -> Result<String> {
    let inode = view.inode(number)?;
    let mut seen = format!(" {} ", view.allocated(&inode)?);
    let file = view.open_file(&inode)?;
    let content = |from: u64, bytes: u64| -> Result<Vec<u8>> {
        let mut buffer = vec![0; bytes as usize];
        let count = file.read_at(&mut buffer, from).map_err(Error::Input)?;
        buffer.truncate(count);
        Ok(buffer)
    };
    for from in [0, file.size().saturating_sub(MOST_READ / 2), u64::MAX - 1] {
        let content = content(from, MOST_READ)?;
        assert!(from.saturating_add(content.len() as u64) <= file.size().max(from));
        seen += &format!("{}", blake3::hash(&content));
    }
    let mut at = 0;
    for _ in 0..50 {
        let Some(data) = file.next_data(at) else {
            break;
        };
        let hole = file.next_hole(data);
        assert!(
            data >= at && hole >= data && hole <= file.size(),
            "{at} {data} {hole}"
        );
        seen += &format!(" {data}-{hole}");
        if hole <= at {
            break;
        }
        at = hole;
    }
    if let Some(host) = file.host_file() {
        let length = host.metadata().map_err(Error::Input)?.len();
        assert_eq!(
            length,
            file.size(),
            "a host's file that is not exactly the content"
        );
    }
    Ok(seen)
}

/// Puts the whole of a file back, whatever became of it.
pub struct PutBack {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl PutBack {
    /// Writes `bad` in place of what is there.
    pub fn after(path: &Path, bad: &[u8]) -> Self {
        let bytes = fs::read(path).unwrap();
        fs::write(path, bad).unwrap();
        Self {
            path: path.to_owned(),
            bytes,
        }
    }
}

impl Drop for PutBack {
    fn drop(&mut self) {
        fs::write(&self.path, &self.bytes).unwrap();
    }
}

/// Fails unless the message says which file it is about.
pub fn assert_names(error: &Error, path: &Path) {
    let message = error.to_string();
    let file = path.file_stem().unwrap().to_str().unwrap();
    assert!(message.contains(file), "{message:?} does not name {file}");
}
