//! OCI layouts: from `index.json` to manifests.

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os, Platform};

use super::super::{Result, reference};
use super::{ArchivedImage, Document, Spool, assemble, blob, document, refuse, text};

/// The complete name, as containerd's and Docker's exporters write it.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The name or only the tag.
const OCI_NAME: &str = "org.opencontainers.image.ref.name";
/// Indexes within indexes that are followed.
const DEEPEST_INDEX: usize = 4;

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_LAYERS: [&str; 5] = [
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// The images that `index.json` names.
pub(super) fn images(spool: &Spool, use_names: bool) -> Result<Vec<ArchivedImage>> {
    check_version(spool)?;
    let index = spool
        .by_name("index.json")
        .ok_or_else(|| refuse("index.json", "it is missing from the archive"))?;
    let index: ImageIndex = parse("index.json", &text(spool, index, "index.json")?)?;
    let mut chosen: Vec<(Option<String>, &Descriptor)> = Vec::new();
    for descriptor in index.manifests() {
        if is_attestation(descriptor) {
            continue;
        }
        let name = use_names.then(|| name(descriptor)).flatten();
        // Several platforms of one image side by side: the host's.
        let rival = descriptor.platform().as_ref().and_then(|_| {
            chosen
                .iter_mut()
                .find(|(other, rival)| *other == name && rival.platform().is_some())
        });
        match rival {
            Some((_, rival)) if rank(descriptor) > rank(rival) => *rival = descriptor,
            Some(_) => {}
            None => chosen.push((name, descriptor)),
        }
    }
    let mut images: Vec<ArchivedImage> = Vec::new();
    for (name, descriptor) in chosen {
        let names = match name {
            Some(name) => vec![reference::complete(&name)?],
            None => Vec::new(),
        };
        let manifest = manifest(spool, descriptor, 0)?;
        match images
            .iter_mut()
            .find(|image| image.manifest.digest == manifest.digest)
        {
            Some(image) => image.names.extend(names),
            None => images.push(image(spool, names, manifest)?),
        }
    }
    Ok(images)
}

fn check_version(spool: &Spool) -> Result<()> {
    let Some(file) = spool.by_name("oci-layout") else {
        return Err(refuse(
            "oci-layout",
            "it is missing from the archive; this is no OCI layout",
        ));
    };
    let layout: oci_spec::image::OciLayout =
        parse("oci-layout", &text(spool, file, "oci-layout")?)?;
    let version = layout.image_layout_version();
    if version.split('.').next() != Some("1") {
        let problem = format!("the layout has version {version:?}; 1.x is supported");
        return Err(refuse("oci-layout", problem));
    }
    Ok(())
}

fn name(descriptor: &Descriptor) -> Option<String> {
    let annotations = descriptor.annotations().as_ref()?;
    [CONTAINERD_NAME, OCI_NAME]
        .iter()
        .find_map(|key| annotations.get(*key))
        .filter(|name| !name.is_empty())
        .cloned()
}

/// Follows indexes down to the manifest of the host's platform.
fn manifest(spool: &Spool, descriptor: &Descriptor, depth: usize) -> Result<Document> {
    match descriptor.media_type() {
        MediaType::ImageManifest => {}
        MediaType::Other(other) if other == DOCKER_MANIFEST => {}
        MediaType::ImageIndex => return through_index(spool, descriptor, depth),
        MediaType::Other(other) if other == DOCKER_LIST => {
            return through_index(spool, descriptor, depth);
        }
        other => {
            let subject = format!("the blob {}", descriptor.digest());
            return Err(refuse(
                subject,
                format!(
                    "its media type {other:?} is no image manifest or index",
                    other = other.as_ref()
                ),
            ));
        }
    }
    document(
        spool,
        descriptor.digest(),
        Some(descriptor.size()),
        "manifest",
    )
}

fn through_index(spool: &Spool, descriptor: &Descriptor, depth: usize) -> Result<Document> {
    let read = document(spool, descriptor.digest(), Some(descriptor.size()), "index")?;
    let subject = format!("the index {}", read.digest);
    if depth == DEEPEST_INDEX {
        return Err(refuse(subject, "indexes are nested too deeply"));
    }
    let index: ImageIndex = parse(&subject, &read.json)?;
    let candidates: Vec<_> = index
        .manifests()
        .iter()
        .filter(|d| !is_attestation(d))
        .collect();
    let best = candidates
        .iter()
        // Of equals the first; max_by_key takes the last.
        .rev()
        .max_by_key(|candidate| rank(candidate))
        .filter(|best| rank(best) > Rank::Foreign);
    match best {
        Some(best) => manifest(spool, best, depth + 1),
        None => {
            let offered: Vec<String> = candidates
                .iter()
                .filter_map(|candidate| candidate.platform().as_ref())
                .map(|platform| format!("{}/{}", platform.os(), platform.architecture()))
                .collect();
            let problem = format!(
                "it has no image for linux/{}; it has {}",
                host_architecture(),
                if offered.is_empty() {
                    "none".to_owned()
                } else {
                    offered.join(", ")
                }
            );
            Err(refuse(subject, problem))
        }
    }
}

fn image(spool: &Spool, names: Vec<String>, manifest: Document) -> Result<ArchivedImage> {
    let subject = format!("the manifest {}", manifest.digest);
    let parsed: ImageManifest = parse(&subject, &manifest.json)?;
    let mut layers = Vec::with_capacity(parsed.layers().len());
    for layer in parsed.layers() {
        check_layer_type(layer)?;
        layers.push(blob(spool, layer.digest(), Some(layer.size()), "layer")?);
    }
    assemble(spool, names, manifest, parsed.config().digest(), layers)
}

fn check_layer_type(layer: &Descriptor) -> Result<()> {
    match layer.media_type() {
        MediaType::ImageLayer
        | MediaType::ImageLayerGzip
        | MediaType::ImageLayerZstd
        | MediaType::ImageLayerNonDistributable
        | MediaType::ImageLayerNonDistributableGzip
        | MediaType::ImageLayerNonDistributableZstd => Ok(()),
        MediaType::Other(other) if DOCKER_LAYERS.contains(&other.as_str()) => Ok(()),
        other => {
            let problem = format!(
                "its media type {:?} is not supported; a layer is a tar, plain or compressed with gzip or zstd",
                other.as_ref()
            );
            Err(refuse(format!("the layer {}", layer.digest()), problem))
        }
    }
}

/// Signatures and build provenance that builders put beside an image.
fn is_attestation(descriptor: &Descriptor) -> bool {
    descriptor.artifact_type().is_some()
        || descriptor
            .annotations()
            .as_ref()
            .is_some_and(|annotations| annotations.contains_key("vnd.docker.reference.type"))
}

/// How well a manifest fits the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Foreign,
    /// It does not say.
    Unknown,
    /// The architecture is right, the variant another one than the usual.
    Near,
    Exact,
}

fn rank(descriptor: &Descriptor) -> Rank {
    descriptor
        .platform()
        .as_ref()
        .map_or(Rank::Unknown, rank_platform)
}

fn rank_platform(platform: &Platform) -> Rank {
    if *platform.os() != Os::Linux || platform.architecture().to_string() != host_architecture() {
        return Rank::Foreign;
    }
    let usual = match platform.architecture() {
        Arch::ARM => "v7",
        Arch::ARM64 => "v8",
        Arch::Amd64 => "v1",
        _ => "",
    };
    match platform.variant().as_deref() {
        None | Some("") => Rank::Exact,
        Some(variant) if variant == usual => Rank::Exact,
        // Newer instructions than the host may have.
        Some(_) if *platform.architecture() == Arch::Amd64 => Rank::Foreign,
        Some(_) => Rank::Near,
    }
}

/// The host's architecture in GOARCH's words.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        other => other,
    }
}

fn parse<T: serde::de::DeserializeOwned>(subject: &str, json: &str) -> Result<T> {
    serde_json::from_str(json)
        .map_err(|error| refuse(subject, format!("it cannot be understood: {error}")))
}
