//! What `docker save` and `podman save` write: `manifest.json` beside configs and layers.

use oci_spec::image::{DescriptorBuilder, Digest, ImageManifestBuilder, MediaType, Sha256Digest};
use serde::Deserialize;
use sha2::Digest as _;

use super::super::{Result, reference};
use super::{ArchivedImage, Document, File, Spool, assemble, refuse, text};

/// One element of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Element {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// The images that `manifest.json` names.
pub(super) fn images(spool: &Spool, use_names: bool) -> Result<Vec<ArchivedImage>> {
    let file = member(spool, "manifest.json")?;
    let elements: Vec<Element> = serde_json::from_str(&text(spool, file, "manifest.json")?)
        .map_err(|error| refuse("manifest.json", format!("it cannot be understood: {error}")))?;
    elements
        .into_iter()
        .map(|element| image(spool, element, use_names))
        .collect()
}

fn image(spool: &Spool, element: Element, use_names: bool) -> Result<ArchivedImage> {
    let mut names = Vec::new();
    if use_names {
        for name in element.repo_tags.unwrap_or_default() {
            names.push(reference::complete(&name)?);
        }
    }
    let config = member(spool, &element.config)?;
    let mut layers = Vec::new();
    for name in element.layers.unwrap_or_default() {
        let file = member(spool, &name)?;
        layers.push((file.digest().to_owned(), file.clone()));
    }
    let manifest = manifest(config, &layers)?;
    assemble(spool, names, manifest, &digest(config)?, layers)
}

/// The OCI manifest that says what this one does; the format has none of its own.
fn manifest(config: &File, layers: &[(String, File)]) -> Result<Document> {
    let fail = |error: oci_spec::OciSpecError| refuse("manifest.json", error.to_string());
    let describe = |file: &File, media_type: MediaType| {
        DescriptorBuilder::default()
            .media_type(media_type)
            .digest(digest(file)?)
            .size(file.size)
            .build()
            .map_err(fail)
    };
    let layers = layers
        .iter()
        .map(|(_, file)| describe(file, MediaType::ImageLayer))
        .collect::<Result<Vec<_>>>()?;
    let json = ImageManifestBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageManifest)
        .config(describe(config, MediaType::ImageConfig)?)
        .layers(layers)
        .build()
        .and_then(|manifest| manifest.to_string())
        .map_err(fail)?;
    let digest = format!("sha256:{:x}", sha2::Sha256::digest(json.as_bytes()));
    Ok(Document { digest, json })
}

fn digest(file: &File) -> Result<Digest> {
    let hex = file.digest().trim_start_matches("sha256:");
    hex.parse::<Sha256Digest>()
        .map(Digest::from)
        .map_err(|error| refuse("manifest.json", error.to_string()))
}

fn member<'a>(spool: &'a Spool, name: &str) -> Result<&'a File> {
    spool.by_name(name.trim_start_matches("./")).ok_or_else(|| {
        refuse(
            format!("the member {name:?}"),
            "it is missing from the archive",
        )
    })
}
