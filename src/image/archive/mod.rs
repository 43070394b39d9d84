//! Image archives: what is in them, before any layer is unpacked.
//!
//! An archive is a tar stream of an OCI layout (`oci-layout`, `index.json`, `blobs/`), or what `docker
//! save` writes (`manifest.json`); either may be compressed as a whole. Its members come in any order,
//! so [`spool`] takes all of them in, in one pass and with bounded memory; [`layout`] and [`docker`]
//! then say which images they make.

mod docker;
mod layout;
mod spool;

use oci_spec::image::{Digest, ImageConfiguration};

pub use spool::{File, Spool, clear};

use super::{Error, Result, reference};

/// Bytes of the largest index, manifest or config that is read.
const LARGEST_DOCUMENT: u64 = 3 << 20;
/// Most layers of an image.
const MOST_LAYERS: usize = 1024;

/// One image of an archive, its documents read and found to agree.
#[derive(Debug)]
pub struct ArchivedImage {
    /// Complete names.
    pub names: Vec<String>,
    /// The manifest; for a `docker save` archive one that says the same.
    pub manifest: Document,
    /// The config.
    pub config: Document,
    /// The config, understood.
    pub configuration: ImageConfiguration,
    /// The layers, the bottom first.
    pub layers: Vec<ArchivedLayer>,
}

/// A JSON document and its digest.
#[derive(Debug, Clone)]
pub struct Document {
    /// `sha256:...`
    pub digest: String,
    /// The text, byte by byte as it was in the archive.
    pub json: String,
}

/// One layer of an image.
#[derive(Debug)]
pub struct ArchivedLayer {
    /// Digest of the blob.
    pub digest: String,
    /// Digest that the uncompressed blob must have.
    pub diff_id: String,
    /// The blob.
    pub file: File,
}

/// The images of an archive that has been taken in. `name` is to be the name of the only image.
pub fn images(spool: &Spool, name: Option<&str>) -> Result<Vec<ArchivedImage>> {
    let mut images = if spool.contains("index.json") {
        layout::images(spool, name.is_none())?
    } else if spool.contains("manifest.json") {
        docker::images(spool, name.is_none())?
    } else {
        return Err(Error::NoArchive {
            problem: "it has neither index.json nor manifest.json",
        });
    };
    if let Some(name) = name {
        let [image] = images.as_mut_slice() else {
            if images.is_empty() {
                return Err(refuse("index.json", "it names no image"));
            }
            let problem = format!(
                "it holds {} images, and one name was given; leave out --name, and each gets the name that it has there, or take one out with `skopeo copy oci-archive:FILE:NAME oci-archive:NEW`",
                images.len()
            );
            return Err(refuse("the archive", problem));
        };
        image.names = vec![reference::complete(name)?];
    }
    if images.is_empty() {
        return Err(refuse("index.json", "it names no image"));
    }
    Ok(images)
}

/// Puts an image together from its manifest's parts and checks that they agree.
fn assemble(
    spool: &Spool,
    names: Vec<String>,
    manifest: Document,
    config_digest: &Digest,
    layers: Vec<(String, File)>,
) -> Result<ArchivedImage> {
    let config = document(spool, config_digest, None, "config")?;
    let subject = format!("the config {}", config.digest);
    let configuration: ImageConfiguration = serde_json::from_str(&config.json)
        .map_err(|error| refuse(&subject, format!("it is not an image config: {error}")))?;
    let diff_ids = configuration.rootfs().diff_ids();
    if diff_ids.len() != layers.len() {
        let problem = format!(
            "it has {} diff ids, and the manifest {} has {} layers",
            diff_ids.len(),
            manifest.digest,
            layers.len()
        );
        return Err(refuse(&subject, problem));
    }
    if layers.len() > MOST_LAYERS {
        let problem = format!(
            "it has {} layers; {MOST_LAYERS} are the limit",
            layers.len()
        );
        return Err(refuse(&subject, problem));
    }
    let mut archived = Vec::with_capacity(layers.len());
    for ((digest, file), diff_id) in layers.into_iter().zip(diff_ids) {
        hex(diff_id)
            .ok_or_else(|| refuse(&subject, format!("{diff_id:?} is not a sha256 digest")))?;
        archived.push(ArchivedLayer {
            digest,
            diff_id: diff_id.clone(),
            file,
        });
    }
    Ok(ArchivedImage {
        names,
        manifest,
        config,
        configuration,
        layers: archived,
    })
}

/// Reads a blob that is a document. `size` is what its descriptor claims.
fn document(spool: &Spool, digest: &Digest, size: Option<u64>, what: &str) -> Result<Document> {
    let (digest, file) = blob(spool, digest, size, what)?;
    let json = text(spool, &file, &format!("the {what} {digest}"))?;
    Ok(Document { digest, json })
}

/// Finds a blob by its digest.
fn blob(spool: &Spool, digest: &Digest, size: Option<u64>, what: &str) -> Result<(String, File)> {
    let digest = digest.to_string();
    let subject = format!("the {what} {digest}");
    if hex(&digest).is_none() {
        return Err(refuse(&subject, "only sha256 digests are supported"));
    }
    let file = spool
        .by_digest(&digest)
        .ok_or_else(|| refuse(&subject, "the blob is missing from the archive"))?;
    if let Some(size) = size.filter(|&size| size != file.size) {
        let problem = format!(
            "the descriptor says {size} bytes, the blob has {}",
            file.size
        );
        return Err(refuse(&subject, problem));
    }
    Ok((digest, file))
}

fn text(spool: &Spool, file: &File, subject: &str) -> Result<String> {
    if file.size > LARGEST_DOCUMENT {
        let problem = format!(
            "it has {} bytes; a document may have {LARGEST_DOCUMENT}",
            file.size
        );
        return Err(refuse(subject, problem));
    }
    String::from_utf8(spool.read(file)?).map_err(|_| refuse(subject, "it is not UTF-8"))
}

/// The hex digits of a sha256 digest.
fn hex(digest: &str) -> Option<&str> {
    digest.strip_prefix("sha256:").filter(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

fn refuse(subject: impl Into<String>, problem: impl Into<String>) -> Error {
    Error::Archive {
        subject: subject.into(),
        problem: problem.into(),
    }
}
