//! A store that has something of all that the page describes.

use std::fs;
use std::path::PathBuf;

use crate::store::error::Result;
use crate::store::format::tables::Extent;
use crate::store::ingest::{NewLayer, Settings};
use crate::store::layer::index::{Attributes, Body};
use crate::store::layers::{Expected, Layers};
use crate::store::pack::{self, PackId};
use crate::store::view::{Verify, View};
use crate::store::{LayerName, ObjectName, Time};

/// A store with a layer of each kind, and what they were made of.
pub struct Sample {
    pub dir: tempfile::TempDir,
    pub layers: Layers,
    pub stream: Vec<u8>,
    /// Of a stream, and of a commit on it.
    pub names: [LayerName; 2],
    pub view: View,
}

/// Content that no compression makes smaller.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    content
}

pub const SMALL: usize = 1000;
pub const LARGE: usize = 300_000;

pub fn large() -> Vec<u8> {
    let mut content = noise(LARGE);
    // One frame is compressed.
    content[..131_072].fill(b'l');
    content
}

pub fn committed(layer: &mut NewLayer<'_, '_>) -> Result<()> {
    let attributes = |kind: u32, xattrs: &[(&str, &str)]| Attributes {
        mode: kind as u16 | 0o1750,
        uid: 3,
        gid: 4,
        mtime: Time { sec: -5, nsec: 6 },
        atime: Time { sec: 7, nsec: 8 },
        xattrs: xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect(),
    };
    layer.make(&[], &attributes(libc::S_IFDIR, &[]), &Body::Nothing)?;
    layer.make(&[b"dir"], &attributes(libc::S_IFDIR, &[]), &Body::Nothing)?;
    let mut new = layer.begin(5)?;
    new.write(b"small")?;
    let content = layer.end(new)?;
    let named = attributes(libc::S_IFREG, &[("user.name", "value"), ("user.two", "2")]);
    layer.make(
        &[b"dir", b"whole"],
        &named,
        &Body::Whole { size: 5, content },
    )?;
    layer.link(&[b"dir", b"linked"], &named, b"dir/whole")?;
    let extent = |offset, object_offset| Extent {
        offset,
        length: 2,
        object_offset,
        object: content,
    };
    let parts = Body::Sparse {
        size: 100,
        extents: vec![extent(10, 1), extent(20, 3)],
    };
    layer.make(&[b"dir", b"parts"], &attributes(libc::S_IFREG, &[]), &parts)?;
    let target = Body::Target(b"to/there".to_vec());
    layer.make(
        &[b"dir", b"symlink"],
        &attributes(libc::S_IFLNK, &[]),
        &target,
    )?;
    let (major, minor) = (8, 9);
    let device = Body::Device { major, minor };
    layer.make(
        &[b"dir", b"zdevice"],
        &attributes(libc::S_IFBLK, &[]),
        &device,
    )?;
    layer.remove(&[b"gone"])
}

impl Sample {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (layers, _) = Layers::open(dir.path(), Settings::default()).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let files = [
            ("a", vec![b'a'; SMALL]),
            ("b", noise(SMALL)),
            ("gone", Vec::new()),
            ("large", large()),
            ("dir/.wh..wh..opq", Vec::new()),
            (".wh.nothing", Vec::new()),
        ];
        for (name, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &*content).unwrap();
        }
        let stream = builder.into_inner().unwrap();
        let base = layers.import(&*stream, &Expected::default(), &()).unwrap();
        let top = layers.make(committed).unwrap().name;
        let view = layers.view(&[base, top], Verify::First).unwrap();
        Self {
            dir,
            layers,
            stream,
            names: [base, top],
            view,
        }
    }

    /// The file of the store that has this content.
    pub fn pack_of(&self, content: &[u8]) -> (PathBuf, PackId) {
        let name = ObjectName::of(content);
        let packs = fs::read_dir(self.dir.path().join("packs")).unwrap();
        packs
            .map(|entry| entry.unwrap())
            .find_map(|entry| {
                let id = PackId::of_file(entry.file_name().to_str()?)?;
                let found = pack::look_into(&entry.path(), id).unwrap();
                let has = found.objects.iter().any(|(object, _)| object.name == name);
                has.then(|| (entry.path(), id))
            })
            .unwrap()
    }

    pub fn object(&self, content: &[u8]) -> PathBuf {
        let name = ObjectName::of(content).to_string();
        self.dir.path().join("objects").join(&name[..2]).join(name)
    }
}
