//! Images of the tests' own: busybox, and whatever else a test wants in the root.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::bench::fill_root;
use crate::common::Plyd;

/// An image in the making: a root directory that becomes its only layer.
pub struct Image {
    dir: PathBuf,
    config: Value,
}

impl Image {
    /// Busybox, below a directory of plyd's.
    pub fn new(plyd: &Plyd, name: &str) -> Self {
        let dir = plyd.dir().join(format!("image-{name}"));
        fs::create_dir_all(dir.join("root")).unwrap();
        fill_root(&dir.join("root"));
        Self {
            dir,
            config: json!({"Env": ["PATH=/bin"], "Cmd": ["sh"]}),
        }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Sets one key of the image's config.
    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// Loads it as `name`.
    pub fn load(&self, plyd: &Plyd, name: &str) {
        let layout = self.dir.join("layout");
        fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
        let mut tar = tar::Builder::new(Vec::new());
        tar.follow_symlinks(false);
        tar.append_dir_all(".", self.root()).unwrap();
        let layer = blob(&layout, &tar.into_inner().unwrap());
        let config = blob(
            &layout,
            json!({
                "architecture": "amd64",
                "os": "linux",
                "config": self.config,
                "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            })
            .to_string()
            .as_bytes(),
        );
        let typed = |mut descriptor: Value, kind: &str| {
            descriptor["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
            descriptor
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": typed(config, "config.v1+json"),
            "layers": [typed(layer, "layer.v1.tar")],
        });
        let manifest = blob(&layout, manifest.to_string().as_bytes());
        let index = json!({
            "schemaVersion": 2,
            "manifests": [typed(manifest, "manifest.v1+json")],
        });
        fs::write(layout.join("index.json"), index.to_string()).unwrap();
        fs::write(
            layout.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        let layout = layout.to_str().unwrap();
        plyd.ok(["image", "load", "-q", "-i", layout, "--name", name]);
    }
}

fn blob(layout: &Path, bytes: &[u8]) -> Value {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    fs::write(layout.join("blobs/sha256").join(&hex), bytes).unwrap();
    json!({"digest": format!("sha256:{hex}"), "size": bytes.len()})
}
