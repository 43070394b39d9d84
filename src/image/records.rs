//! What is kept of images on the disk.
//!
//! ```text
//! images/records/ID.record    an image: its documents and what was made of them
//! images/names/HASH.record    one name and the image that has it; HASH is the name's blake3
//! images/spool/               archives that are being taken in
//! ```
//!
//! A name has a record of its own, so that it moves from one image to another by one rename. It is written after that of its image
//! and removed before it, so an image that a name leads to and that has no record has lost it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::SystemTime;

use oci_spec::image::ImageManifest;
use serde::{Deserialize, Serialize};

use super::{Image, Result};
use crate::store::record::{Damaged, Record, RecordDir};

/// An image, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// `sha256:...` of the manifest.
    pub manifest_digest: String,
    /// The manifest, byte by byte.
    pub manifest: String,
    /// The config, byte by byte; its digest is the record's id.
    pub config: String,
    /// Digests of the uncompressed layers, the bottom first.
    pub diff_ids: Vec<String>,
    /// Chain ids of the same layers.
    pub chain_ids: Vec<String>,
    pub architecture: String,
    pub os: String,
    /// When it was built.
    pub created: Option<SystemTime>,
    /// Bytes of all layers on disk.
    pub size: u64,
}

impl Record for ImageRecord {
    const KIND: &'static str = "image";
    const VERSION: u32 = 1;
    const REMEDY: &'static str = "`snapctl system repair -i` or `snapctl image load` with the image's archive makes it anew; only without that restore it from a backup and run `snapctl system repair`, or give the image up with `snapctl image rm`";
}

/// A name, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct NameRecord {
    pub name: String,
    /// Id of the image.
    pub image: String,
}

impl Record for NameRecord {
    const KIND: &'static str = "image-name";
    const VERSION: u32 = 1;
    const REMEDY: &'static str = "`snapctl system repair -i` or `snapctl image load` with an archive that gives the name makes it anew; only without that restore it from a backup and run `snapctl system repair`, or delete the file to give the name up and start plyd again";
}

/// All records, and what of them is looked at often.
#[derive(Debug)]
pub(super) struct Records {
    images: RecordDir<ImageRecord>,
    names: RecordDir<NameRecord>,
    known: BTreeMap<String, Known>,
    /// Of images that are known and of damaged ones.
    by_name: BTreeMap<String, String>,
    /// Images whose records could not be read, or are gone, by their ids: what they need is not known.
    damaged: BTreeMap<String, Damaged>,
    /// The same of names, by the hashes that are their records' ids.
    damaged_names: BTreeMap<String, Damaged>,
}

/// Records that cannot be used.
pub(super) struct Unsound {
    pub(super) images: Vec<Damaged>,
    pub(super) names: Vec<Damaged>,
}

#[derive(Debug)]
struct Known {
    image: Image,
    chain_ids: Vec<String>,
}

impl Records {
    /// Reads all records in `dir`. One that is damaged, or gone, is logged and left alone.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let mut records = Self {
            images: RecordDir::open(&dir.join("records"))?,
            names: RecordDir::open(&dir.join("names"))?,
            known: BTreeMap::new(),
            by_name: BTreeMap::new(),
            damaged: BTreeMap::new(),
            damaged_names: BTreeMap::new(),
        };
        let images = records.images.list()?;
        let names = records.names.list()?;
        let by_id = |damaged: Vec<Damaged>| {
            let ids = damaged
                .into_iter()
                .map(|damaged| (damaged.id.clone(), damaged));
            ids.collect()
        };
        records.damaged = by_id(images.damaged);
        records.damaged_names = by_id(names.damaged);
        for (id, record) in images.records {
            records.know(id, &record);
        }
        for (_, record) in names.records {
            records.know_name(record);
        }
        for damaged in records.all_damaged() {
            tracing::error!("{damaged}");
        }
        Ok(records)
    }

    /// Fails if the record of an image, or of one of the names, is a newer release's.
    pub(super) fn check_replaceable(&self, id: &str, names: &[String]) -> Result<()> {
        self.images.check_replaceable(id)?;
        for name in names {
            self.names.check_replaceable(&key(name))?;
        }
        Ok(())
    }

    /// Keeps an image; one of the same id is replaced.
    pub(super) fn put(&mut self, id: &str, record: &ImageRecord) -> Result<()> {
        self.images.put(id, record)?;
        self.damaged.remove(id);
        self.know(id.to_owned(), record);
        Ok(())
    }

    /// Gives a name to an image, taking it from any other.
    pub(super) fn put_name(&mut self, name: &str, id: &str) -> Result<()> {
        let record = NameRecord {
            name: name.to_owned(),
            image: id.to_owned(),
        };
        self.names.put(&key(name), &record)?;
        self.damaged_names.remove(&key(name));
        self.by_name.insert(record.name, record.image);
        self.forget_gone();
        Ok(())
    }

    /// Takes a name away.
    pub(super) fn remove_name(&mut self, name: &str) -> Result<()> {
        self.names.remove(&key(name))?;
        self.by_name.remove(name);
        self.forget_gone();
        Ok(())
    }

    /// Forgets an image that has no name any more.
    pub(super) fn remove(&mut self, id: &str) -> Result<()> {
        self.images.remove(id)?;
        self.known.remove(id);
        self.damaged.remove(id);
        Ok(())
    }

    /// Without a name nothing tells of an image whose record is gone.
    fn forget_gone(&mut self) {
        let (named, images) = (&self.by_name, &self.images);
        self.damaged.retain(|id, _| {
            named.values().any(|of| of == id) || !matches!(images.get(id), Ok(None))
        });
    }

    /// The whole record, read from the disk.
    pub(super) fn read(&self, id: &str) -> Result<Option<ImageRecord>> {
        Ok(self.images.get(id)?)
    }

    /// Which image has the name.
    pub(super) fn named(&self, name: &str) -> Option<&str> {
        self.by_name.get(name).map(String::as_str)
    }

    /// The damaged record that a name leads to, if it does.
    pub(super) fn damaged_of_name(&self, name: &str) -> Option<&Damaged> {
        let of_image = self.named(name).and_then(|id| self.damaged.get(id));
        of_image.or_else(|| self.damaged_names.get(&key(name)))
    }

    /// What is known of an image of which nothing can be read.
    pub(super) fn unreadable(&self, id: &str) -> Option<Image> {
        let names = self.names_of(id).into_iter();
        self.damaged.contains_key(id).then(|| Image {
            id: id.to_owned(),
            names: names.map(str::to_owned).collect(),
            manifest_digest: String::new(),
            diff_ids: Vec::new(),
            chain_id: String::new(),
            architecture: String::new(),
            os: String::new(),
            created: None,
            size: 0,
        })
    }

    /// The damaged records of images.
    pub(super) fn damaged(&self) -> impl Iterator<Item = &Damaged> {
        self.damaged.values()
    }

    /// The damaged records of images and of names.
    pub(super) fn all_damaged(&self) -> impl Iterator<Item = &Damaged> {
        self.damaged().chain(self.damaged_names.values())
    }

    /// Takes records as they are on the disk of which nothing is known, as they could not be used when plyd started, or were not
    /// there; says what they are of, in words.
    pub(super) fn take_put_back(&mut self) -> Result<Vec<String>> {
        let mut images = self.images.list()?.records;
        images.retain(|(id, _)| !self.known.contains_key(id));
        let mut names = self.names.list()?.records;
        names.retain(|(_, record)| !self.by_name.contains_key(&record.name));
        for (id, record) in &images {
            self.damaged.remove(id);
            self.know(id.clone(), record);
        }
        let names = names.into_iter().map(|(id, record)| {
            self.damaged_names.remove(&id);
            let taken = format!("the name {} of an image", record.name);
            self.know_name(record);
            taken
        });
        let names: Vec<String> = names.collect();
        let images = images.iter().map(|(id, _)| self.words(id));
        Ok(images.chain(names).collect())
    }

    /// Records that cannot be used now, or are gone though what they are of is not.
    pub(super) fn examine(&self) -> Result<Unsound> {
        let names = self.by_name.keys().map(|name| key(name));
        let images = self.known.keys().chain(self.by_name.values());
        let images: BTreeSet<&String> = images.collect();
        Ok(Unsound {
            images: self.images.examine(images.into_iter().cloned())?,
            names: self.names.examine(names)?,
        })
    }

    /// The name whose record has the id, if that is known.
    pub(super) fn name_of(&self, record: &str) -> Option<&str> {
        let mut names = self.by_name.keys();
        names.find(|name| key(name) == record).map(String::as_str)
    }

    /// An image, whose record need not be sound, in words.
    pub(super) fn words(&self, id: &str) -> String {
        format!("the image {}", self.names_of(id).first().unwrap_or(&id))
    }

    /// Names of an image whose record need not be sound.
    fn names_of(&self, id: &str) -> Vec<&str> {
        let names = self.by_name.iter().filter(|(_, of)| *of == id);
        names.map(|(name, _)| name.as_str()).collect()
    }

    /// The blob that the manifest of an image says to have the content `diff_id`, and an image that says so.
    pub(super) fn blob_of(&self, diff_id: &str) -> Option<(String, Image)> {
        self.known.iter().find_map(|(id, known)| {
            let mut diff_ids = known.image.diff_ids.iter();
            let place = diff_ids.position(|of| of == diff_id)?;
            // Without its record another image may know.
            let record = self.images.get(id).ok()??;
            let manifest: ImageManifest = serde_json::from_str(&record.manifest).ok()?;
            let blob = manifest.layers().get(place)?.digest().to_string();
            Some((blob, self.with_names(id, known)))
        })
    }

    /// One image.
    pub(super) fn image(&self, id: &str) -> Option<Image> {
        self.known.get(id).map(|known| self.with_names(id, known))
    }

    /// All images, in order of id.
    pub(super) fn all(&self) -> impl Iterator<Item = Image> {
        self.known
            .iter()
            .map(|(id, known)| self.with_names(id, known))
    }

    /// All images with the chain ids of their layers, the bottom first.
    pub(super) fn chains(&self) -> impl Iterator<Item = (Image, Vec<String>)> {
        self.known
            .iter()
            .map(|(id, known)| (self.with_names(id, known), known.chain_ids.clone()))
    }

    /// Whether some image needs the layer, or may need it for all that can be read.
    pub(super) fn need(&self, chain_id: &str) -> bool {
        !self.damaged.is_empty()
            || self
                .known
                .values()
                .any(|known| known.chain_ids.iter().any(|id| id == chain_id))
    }

    fn know(&mut self, id: String, record: &ImageRecord) {
        let image = Image {
            id: id.clone(),
            names: Vec::new(),
            manifest_digest: record.manifest_digest.clone(),
            diff_ids: record.diff_ids.clone(),
            chain_id: record.chain_ids.last().cloned().unwrap_or_default(),
            architecture: record.architecture.clone(),
            os: record.os.clone(),
            created: record.created,
            size: record.size,
        };
        let chain_ids = record.chain_ids.clone();
        self.known.insert(id, Known { image, chain_ids });
    }

    fn know_name(&mut self, NameRecord { name, image }: NameRecord) {
        if !self.known.contains_key(&image) && !self.damaged.contains_key(&image) {
            let damaged = self.images.damaged(&image, "it is gone".to_owned());
            self.damaged.insert(image.clone(), damaged);
        }
        self.by_name.insert(name, image);
    }

    fn with_names(&self, id: &str, known: &Known) -> Image {
        let names = self.names_of(id).into_iter();
        Image {
            names: names.map(str::to_owned).collect(),
            ..known.image.clone()
        }
    }
}

/// The id of a name's record.
pub(super) fn key(name: &str) -> String {
    blake3::hash(name.as_bytes()).to_hex().to_string()
}
