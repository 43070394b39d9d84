//! Layers and archives written byte by byte, so that they can be wrong in every way.

use std::io::Write;

use sha2::{Digest, Sha256};

pub const TIME: u64 = 1_600_000_000;

/// What no compression makes smaller, always the same.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut content = vec![0; length];
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes());
    hash.finalize_xof().fill(&mut content);
    content
}

/// A layer's tar.
#[derive(Clone, Default)]
pub struct Layer {
    bytes: Vec<u8>,
}

/// How a header is to look.
pub struct Head<'a> {
    pub path: &'a [u8],
    pub flag: u8,
    pub mode: u32,
    pub link: &'a [u8],
    pub size: u64,
    pub device: (u32, u32),
}

pub fn head(path: &[u8], flag: u8) -> Head<'_> {
    Head {
        path,
        flag,
        mode: if flag == b'5' { 0o755 } else { 0o644 },
        link: b"",
        size: 0,
        device: (0, 0),
    }
}

impl Layer {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn header(mut self, head: &Head<'_>) -> Self {
        if head.path.len() > 100 || head.link.len() > 100 {
            let mut pax = Vec::new();
            pax.push((&b"path"[..], head.path));
            if !head.link.is_empty() {
                pax.push((b"linkpath", head.link));
            }
            self = self.pax(&pax);
        }
        let mut header = tar::Header::new_ustar();
        let old = header.as_old_mut();
        let cut = |text: &[u8]| text.len().min(100);
        old.name[..cut(head.path)].copy_from_slice(&head.path[..cut(head.path)]);
        old.linkname[..cut(head.link)].copy_from_slice(&head.link[..cut(head.link)]);
        old.linkflag = [head.flag];
        header.set_mode(head.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(TIME);
        header.set_size(head.size);
        if head.flag == b'3' || head.flag == b'4' {
            header.set_device_major(head.device.0).unwrap();
            header.set_device_minor(head.device.1).unwrap();
        }
        header.set_cksum();
        self.raw(header.as_bytes())
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn pax(self, records: &[(&[u8], &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            write!(data, "{length} ").unwrap();
            data.extend_from_slice(key);
            data.push(b'=');
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        let mut head = head(b"PaxHeaders/x", b'x');
        head.size = data.len() as u64;
        self.header(&head).data(&data)
    }

    pub fn file(self, path: &str, mode: u32, content: &[u8]) -> Self {
        let mut head = head(path.as_bytes(), b'0');
        head.mode = mode;
        head.size = content.len() as u64;
        self.header(&head).data(content)
    }

    pub fn dir(self, path: &str, mode: u32) -> Self {
        let mut head = head(path.as_bytes(), b'5');
        head.mode = mode;
        self.header(&head)
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        let mut head = head(path.as_bytes(), b'2');
        head.mode = 0o777;
        head.link = target.as_bytes();
        self.header(&head)
    }

    pub fn hardlink(self, path: &str, target: &str, mode: u32) -> Self {
        let mut head = head(path.as_bytes(), b'1');
        head.mode = mode;
        head.link = target.as_bytes();
        self.header(&head)
    }

    pub fn device(self, path: &str, flag: u8, device: (u32, u32)) -> Self {
        let mut head = head(path.as_bytes(), flag);
        head.device = device;
        self.header(&head)
    }

    pub fn tar(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(data: &[u8]) -> Vec<u8> {
    zstd::encode_all(data, 1).unwrap()
}

/// A layer's blob and what is said of it.
#[derive(Clone)]
pub struct Blob {
    pub media_type: String,
    pub bytes: Vec<u8>,
    pub digest: String,
    pub diff_id: String,
    pub size: u64,
}

impl Blob {
    pub fn new(kind: &str, tar: &[u8], bytes: Vec<u8>) -> Self {
        Self {
            media_type: format!("application/vnd.oci.image.layer.v1.tar{kind}"),
            digest: sha256(&bytes),
            diff_id: sha256(tar),
            size: bytes.len() as u64,
            bytes,
        }
    }

    pub fn plain(layer: Layer) -> Self {
        let tar = layer.tar();
        Self::new("", &tar, tar.clone())
    }

    pub fn gzip(layer: Layer) -> Self {
        let tar = layer.tar();
        Self::new("+gzip", &tar, gzip(&tar))
    }

    pub fn zstd(layer: Layer) -> Self {
        let tar = layer.tar();
        Self::new("+zstd", &tar, zstd(&tar))
    }
}

/// The files of an OCI layout, in the order in which they are written.
#[derive(Clone, Default)]
pub struct Layout {
    pub files: Vec<(String, Vec<u8>)>,
    pub manifests: Vec<String>,
}

impl Layout {
    pub fn new() -> Self {
        let mut layout = Self::default();
        layout.put("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        layout
    }

    pub fn put(&mut self, name: &str, bytes: Vec<u8>) {
        self.files.push((name.to_owned(), bytes));
    }

    /// Adds a blob; answers its digest.
    pub fn blob(&mut self, bytes: &[u8]) -> String {
        let digest = sha256(bytes);
        self.put(
            &format!("blobs/{}", digest.replace(':', "/")),
            bytes.to_vec(),
        );
        digest
    }

    /// Adds an image; answers its manifest's descriptor.
    pub fn image(&mut self, blobs: &[Blob], config: &str) -> String {
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for blob in blobs {
            self.put(
                &format!("blobs/{}", blob.digest.replace(':', "/")),
                blob.bytes.clone(),
            );
            layers.push(format!(
                r#"{{"mediaType":"{}","digest":"{}","size":{}}}"#,
                blob.media_type, blob.digest, blob.size
            ));
            diff_ids.push(format!("\"{}\"", blob.diff_id));
        }
        let config = format!(
            r#"{{"created":"2024-05-06T07:08:09Z","architecture":"amd64","os":"linux","config":{{{config}}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            diff_ids.join(",")
        );
        let digest = self.blob(config.as_bytes());
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":{}}},"layers":[{}]}}"#,
            config.len(),
            layers.join(",")
        );
        self.document("application/vnd.oci.image.manifest.v1+json", &manifest, "")
    }

    /// Adds a document; answers a descriptor of it. `more` are further members of that.
    pub fn document(&mut self, media_type: &str, json: &str, more: &str) -> String {
        let digest = self.blob(json.as_bytes());
        format!(
            r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{}{more}}}"#,
            json.len()
        )
    }

    /// Lists a manifest or index in `index.json`, by a name.
    pub fn list(&mut self, descriptor: &str, name: Option<&str>) {
        let annotation = name.map_or_else(String::new, |name| {
            format!(r#","annotations":{{"org.opencontainers.image.ref.name":"{name}"}}"#)
        });
        self.manifests
            .push(descriptor.trim_end_matches('}').to_owned() + &annotation + "}");
    }

    pub fn tar(mut self) -> Vec<u8> {
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            self.manifests.join(",")
        );
        self.put("index.json", index.into_bytes());
        let mut tar = Layer::new();
        for (name, bytes) in &self.files {
            tar = tar.file(name, 0o644, bytes);
        }
        tar.tar()
    }
}

/// An archive of one image.
pub fn archive(name: &str, blobs: &[Blob]) -> Vec<u8> {
    let mut layout = Layout::new();
    let manifest = layout.image(blobs, "");
    layout.list(&manifest, Some(name));
    layout.tar()
}
