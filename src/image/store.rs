//! All images of one plyd.

mod gone;

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;
use parking_lot::Mutex;

use super::records::{self, ImageRecord, Records, Unsound};
use super::unpack::Unpacker;
use super::{
    Error, Image, ImageConfig, ImageDetails, Loaded, Observer, Removed, ResolvedImage, Result,
    archive, io_error, reference, unpack,
};
use crate::snapshotter::Snapshotter;
use crate::store::{
    self,
    record::{self, Damaged},
};

/// All images of one plyd. Every method blocks and may be called from any thread; asynchronous
/// callers go through `spawn_blocking`. What a method has acknowledged is durable.
#[derive(Debug)]
pub struct ImageStore {
    records: Mutex<Records>,
    unpacker: Unpacker,
    spools: PathBuf,
}

impl ImageStore {
    /// Reads the records below `root` (plyd's root) and clears what a crash left. Only one process
    /// may have a root open.
    pub fn open(root: &Path, snapshotter: Arc<Snapshotter>) -> Result<Self> {
        let dir = root.join("images");
        let spools = dir.join("spool");
        store::create_dir(&spools, 0o700).map_err(io_error("make", &spools))?;
        archive::clear(&spools)?;
        let this = Self {
            records: Mutex::new(Records::open(&dir)?),
            unpacker: Unpacker::open(snapshotter)?,
            spools,
        };
        this.tell_tops(&this.records.lock());
        this.sweep_and_log();
        if let Err(error) = this.log_missing() {
            tracing::error!(%error, "cannot tell which layers of images are missing");
        }
        Ok(this)
    }

    /// Reads one image archive to its end and keeps every image in it. `name`, if given, is the
    /// image's name in place of those in the archive. `total`: bytes of the archive, 0 when unknown.
    /// When it fails nothing of it stays.
    pub fn load(
        &self,
        archive: &mut dyn Read,
        name: Option<&str>,
        total: u64,
        observer: &dyn Observer,
    ) -> Result<Vec<Loaded>> {
        if let Some(name) = name {
            reference::complete(name)?;
        }
        let spool = self.spool(archive, total, observer)?;
        let archived = archive::images(&spool, name)?;
        let loaded = self.unpack_and_record(&archived, observer);
        if loaded.is_err() {
            // The reason is worth more than what the clearing up has to say.
            self.sweep_and_log();
        } else {
            // It may have had what was missing.
            self.settle_layers();
        }
        loaded
    }

    /// Takes in an archive as [`load`](Self::load) does, hands its layers to `work`, each as the file with its blob by its diff
    /// id, and writes records that cannot be used anew if it has what they said. Answers also what records these were, in
    /// words, and whether they are all of them. Nothing else of it stays.
    pub fn with_layers<T>(
        &self,
        archive: &mut dyn Read,
        total: u64,
        observer: &dyn Observer,
        work: impl FnOnce(&HashMap<String, PathBuf>) -> T,
    ) -> Result<(T, Vec<String>, Result<()>)> {
        let spool = self.spool(archive, total, observer)?;
        let archived = archive::images(&spool, None)?;
        let layers = archived.iter().flat_map(|image| &image.layers);
        let by_diff_id = layers.map(|layer| (layer.diff_id.clone(), layer.file.path.clone()));
        let done = work(&by_diff_id.collect());
        let mut mended = Vec::new();
        let restored = self.restore_records(&archived, &mut mended, observer);
        Ok((done, mended, restored))
    }

    /// All images, ordered by name; those without one last.
    pub fn list(&self) -> Result<Vec<Image>> {
        let mut images: Vec<Image> = self.records.lock().all().collect();
        images.sort_by(|a, b| {
            let key = |image: &Image| (image.names.is_empty(), image.names.first().cloned());
            key(a).cmp(&key(b)).then_with(|| a.id.cmp(&b.id))
        });
        Ok(images)
    }

    /// How many images and names there are besides those that are listed: their records could not be used when plyd started.
    pub fn unusable(&self) -> usize {
        self.records.lock().all_damaged().count()
    }

    /// All images with the chain ids of their layers, the bottom first: keys of snapshots of
    /// [`Owner::Image`](crate::snapshotter::Owner).
    pub fn chains(&self) -> Vec<(Image, Vec<String>)> {
        self.records.lock().chains().collect()
    }

    /// Whether there is an image of that id.
    pub fn has(&self, id: &str) -> bool {
        self.records
            .lock()
            .chains()
            .any(|(image, _)| image.id == id)
    }

    /// Records that cannot be used now, or are gone though what they are of is not, each with what that is, in words.
    pub fn damaged_records(&self) -> Result<Vec<(Damaged, String)>> {
        let records = self.records.lock();
        let Unsound { images, names } = records.examine()?;
        let images = images.into_iter().map(|damaged| {
            let of = records.words(&damaged.id);
            (damaged, of)
        });
        let names = names
            .into_iter()
            .map(|damaged| match records.name_of(&damaged.id) {
                Some(name) => (damaged.known(), format!("the name {name} of an image")),
                None => (damaged, "a name of an image".to_owned()),
            });
        Ok(images.chain(names).collect())
    }

    /// Records of images that could not be used when plyd started, each with what it is of, in words: of these nothing is known.
    pub fn unknown_images(&self) -> Vec<(Damaged, String)> {
        let records = self.records.lock();
        let damaged = records.damaged().cloned();
        damaged
            .map(|damaged| {
                let of = records.words(&damaged.id);
                (damaged, of)
            })
            .collect()
    }

    /// Takes in records that somebody has put back since plyd started; says what they are of, in words.
    pub fn take_put_back(&self) -> Result<Vec<String>> {
        let mut records = self.records.lock();
        let taken = records.take_put_back()?;
        if !taken.is_empty() {
            self.tell_tops(&records);
        }
        Ok(taken)
    }

    /// Writes records anew of which all is known and that cannot be used, or are gone; says what they are of, in words.
    pub fn mend_records(&self) -> Result<Vec<String>> {
        let mut records = self.records.lock();
        let mut mended = Vec::new();
        let names = records.examine()?.names.into_iter();
        for damaged in names.filter(|damaged| !damaged.newer) {
            let name = records.name_of(&damaged.id).map(str::to_owned);
            let image = name.as_deref().and_then(|name| records.named(name));
            if let Some((name, image)) = name.zip(image.map(str::to_owned)) {
                records.put_name(&name, &image)?;
                mended.push(format!("the name {name} of an image"));
            }
        }
        Ok(mended)
    }

    /// The blob that the manifest of an image says to have the content `diff_id`, and an image that says so.
    pub fn blob_of(&self, diff_id: &str) -> Option<(String, Image)> {
        self.records.lock().blob_of(diff_id)
    }

    /// Writes those records anew that cannot be used and of which the archive has what they said.
    fn restore_records(
        &self,
        archived: &[archive::ArchivedImage],
        mended: &mut Vec<String>,
        observer: &dyn Observer,
    ) -> Result<()> {
        for image in archived {
            let id = id_of(image);
            let chain_ids = unpack::chain_ids(image.layers.iter().map(|l| l.diff_id.as_str()));
            let _pin = self.unpacker.pin(&chain_ids);
            let is_here = self.is_here(id)?;
            let shown = image.names.first().map_or(id, String::as_str);
            for (at, layer) in image.layers.iter().enumerate() {
                let unpacker = &self.unpacker;
                if unpacker.restore_record(layer, &chain_ids, at, observer)?
                    || is_here && unpacker.unpack_missing(layer, &chain_ids, at, observer)?
                {
                    let chain_id = &chain_ids[at];
                    mended.push(format!("the layer with the chain id {chain_id} of {shown}"));
                }
            }
            let Some(size) = self.unpacker.size(&chain_ids)? else {
                continue;
            };
            let mut records = self.records.lock();
            let Unsound { images, names } = records.examine()?;
            let is_among = |damaged: &[Damaged], id: &str| {
                let mut damaged = damaged.iter();
                damaged.any(|damaged| damaged.id == id && !damaged.newer)
            };
            if is_among(&images, id) {
                records.put(id, &record_of(image, chain_ids, size))?;
                mended.push(format!("the image {shown}"));
            }
            for name in &image.names {
                if is_among(&names, &records::key(name)) && records.image(id).is_some() {
                    records.put_name(name, id)?;
                    mended.push(format!("the name {name} of an image"));
                }
            }
        }
        // While one was damaged, or missing, no layer could go.
        self.settle()
    }

    /// One image by name, digest or unique prefix of its id.
    pub fn inspect(&self, reference: &str) -> Result<ImageDetails> {
        let records = self.records.lock();
        let (image, _) = find(&records, reference)?;
        let record = read(&records, &image.id, reference)?;
        Ok(ImageDetails {
            image,
            config_json: record.config,
            manifest_json: record.manifest,
        })
    }

    /// As `inspect`, for whoever wants to run it.
    pub fn resolve(&self, reference: &str) -> Result<ResolvedImage> {
        let details = self.inspect(reference)?;
        // It was parsed before it was recorded, and the record's checksum holds.
        let document: ImageConfiguration =
            serde_json::from_str(&details.config_json).map_err(|error| Error::Archive {
                subject: format!("the config sha256:{}", details.image.id),
                problem: format!("it is not an image config: {error}"),
            })?;
        Ok(ResolvedImage {
            image: details.image,
            config: ImageConfig::from(&document),
        })
    }

    /// Takes one name away, or all when `reference` is no name; the image goes with its last name.
    /// `users_of` names what uses an image; it is asked before an image goes, unless `force`.
    pub fn remove(
        &self,
        reference: &str,
        force: bool,
        users_of: &dyn Fn(&Image) -> Option<String>,
    ) -> Result<Removed> {
        let mut removed = Removed::default();
        {
            let mut records = self.records.lock();
            let (image, name) = gone::find_to_remove(&records, reference)?;
            let names = match name {
                Some(name) => vec![name],
                None => image.names.clone(),
            };
            let last = names.len() == image.names.len();
            if last
                && !force
                && let Some(users) = users_of(&image)
            {
                return Err(Error::InUse {
                    reference: reference.to_owned(),
                    users,
                });
            }
            for name in names {
                records.remove_name(&name)?;
                removed.untagged.push(name);
            }
            if last {
                records.remove(&image.id)?;
                removed.removed.push(image.id);
            }
        }
        if !removed.removed.is_empty() {
            self.settle()?;
        }
        Ok(removed)
    }

    /// Removes the layers that no image, snapshot or import needs. To be called when a snapshot or a container has gone, for it may have
    /// been the last that needed them, and when no record is lacking any more for which some were kept.
    pub fn sweep_and_log(&self) {
        if let Err(error) = self.sweep() {
            tracing::warn!(%error, "layers that nobody needs stay until plyd starts again");
        }
    }

    fn sweep(&self) -> Result<()> {
        let records = self.records.lock();
        self.unpacker.sweep(&|chain_id| records.need(chain_id))?;
        drop(records);
        self.settle_layers();
        Ok(())
    }

    /// Acts on what images there are now.
    fn settle(&self) -> Result<()> {
        self.tell_tops(&self.records.lock());
        self.sweep()
    }

    /// Tells whose views containers will be started on.
    fn tell_tops(&self, records: &Records) {
        let tops = records.all().map(|image| image.chain_id).collect();
        let known = records.damaged().next().is_none();
        self.unpacker.set_tops(known.then_some(tops));
    }

    fn spool(
        &self,
        archive: &mut dyn Read,
        total: u64,
        observer: &dyn Observer,
    ) -> Result<archive::Spool> {
        let dir = self.spools.join(format!("{:032x}", rand::random::<u128>()));
        let mut spool = archive::Spool::create(dir)?;
        spool.fill(archive, total, observer)?;
        Ok(spool)
    }

    fn unpack_and_record(
        &self,
        archived: &[archive::ArchivedImage],
        observer: &dyn Observer,
    ) -> Result<Vec<Loaded>> {
        let mut prepared = Vec::with_capacity(archived.len());
        // Holds the layers until a record does.
        let mut pins = Vec::new();
        for image in archived {
            let chain_ids = unpack::chain_ids(image.layers.iter().map(|l| l.diff_id.as_str()));
            pins.push(self.unpacker.pin(&chain_ids));
            let size = self.unpacker.ensure(&image.layers, &chain_ids, observer)?;
            prepared.push((image, record_of(image, chain_ids, size)));
        }
        if observer.cancelled() {
            return Err(Error::Cancelled);
        }
        self.record(&prepared)
    }

    /// Makes the images known: all of them with all their names, or none.
    fn record(&self, prepared: &[(&archive::ArchivedImage, ImageRecord)]) -> Result<Vec<Loaded>> {
        let mut records = self.records.lock();
        let mut undo = Vec::new();
        if let Err(error) = put_all(&mut records, prepared, &mut undo) {
            for step in undo.into_iter().rev() {
                let undone = match step {
                    Undo::Image(id) => records.remove(&id),
                    Undo::Name(name, Some(id)) => records.put_name(&name, &id),
                    Undo::Name(name, None) => records.remove_name(&name),
                };
                if let Err(error) = undone {
                    tracing::warn!(%error, "cannot take back all of a failed import");
                }
            }
            return Err(error);
        }
        self.tell_tops(&records);
        let loaded = prepared.iter().filter_map(|(archived, _)| {
            let image = records.image(id_of(archived))?;
            let given = archived.names.clone();
            Some(Loaded { image, given })
        });
        Ok(loaded.collect())
    }
}

fn record_of(image: &archive::ArchivedImage, chain_ids: Vec<String>, size: u64) -> ImageRecord {
    let configuration = &image.configuration;
    ImageRecord {
        manifest_digest: image.manifest.digest.clone(),
        manifest: image.manifest.json.clone(),
        config: image.config.json.clone(),
        diff_ids: image.layers.iter().map(|l| l.diff_id.clone()).collect(),
        chain_ids,
        architecture: configuration.architecture().to_string(),
        os: configuration.os().to_string(),
        created: configuration.created().as_deref().and_then(parse_time),
        size,
    }
}

/// How to take back one step of recording.
enum Undo {
    /// The image was not there before.
    Image(String),
    /// The name belonged to another image, or to none.
    Name(String, Option<String>),
}

fn put_all(
    records: &mut Records,
    prepared: &[(&archive::ArchivedImage, ImageRecord)],
    undo: &mut Vec<Undo>,
) -> Result<()> {
    // To take back what was not done would take away what was there.
    for (image, _) in prepared {
        records.check_replaceable(id_of(image), &image.names)?;
    }
    for (image, record) in prepared {
        let id = id_of(image);
        if records.image(id).is_none() {
            undo.push(Undo::Image(id.to_owned()));
        }
        records.put(id, record)?;
    }
    for (image, _) in prepared {
        for name in &image.names {
            let before = records.named(name).map(str::to_owned);
            undo.push(Undo::Name(name.clone(), before));
            records.put_name(name, id_of(image))?;
        }
    }
    Ok(())
}

/// When an image was built; some builders write the year 1 for "I do not say".
fn parse_time(text: &str) -> Option<SystemTime> {
    let time: prost_types::Timestamp = text.parse().ok()?;
    SystemTime::try_from(time)
        .ok()
        .filter(|time| *time > SystemTime::UNIX_EPOCH)
}

fn id_of(image: &archive::ArchivedImage) -> &str {
    image.config.digest.trim_start_matches("sha256:")
}

fn read(records: &Records, id: &str, reference: &str) -> Result<ImageRecord> {
    records.read(id)?.ok_or_else(|| Error::NotFound {
        reference: reference.to_owned(),
    })
}

/// The image that `reference` means, and the name if it is one.
fn find(records: &Records, reference: &str) -> Result<(Image, Option<String>)> {
    let candidates = reference::candidates(reference)?;
    let short = candidates.too_short;
    let not_found = || match (short, records.all_damaged().next()) {
        (true, _) => Error::ShortPrefix {
            reference: reference.to_owned(),
            shortest: reference::SHORTEST_PREFIX,
        },
        (false, Some(damaged)) => Error::NotFoundInSound {
            reference: reference.to_owned(),
            path: damaged.path.clone(),
            remedy: damaged.remedy,
        },
        (false, None) => Error::NotFound {
            reference: reference.to_owned(),
        },
    };
    let lost = |damaged: &Damaged| Error::from(record::Error::from(damaged.clone()));
    for name in &candidates.names {
        if let Some(image) = records.named(name).and_then(|id| records.image(id)) {
            return Ok((image, Some(name.clone())));
        }
    }
    let mut names = candidates.names.iter();
    if let Some(damaged) = names.find_map(|name| records.damaged_of_name(name)) {
        return Err(lost(damaged));
    }
    let digest = candidates.digest.as_deref();
    let prefix = candidates.id_prefix.as_deref();
    let fits = |image: &Image| {
        digest.is_some_and(|digest| {
            image.id == digest || image.manifest_digest.strip_prefix("sha256:") == Some(digest)
        }) || prefix.is_some_and(|prefix| image.id.starts_with(prefix))
    };
    let fits_damaged = |damaged: &&Damaged| {
        digest == Some(&*damaged.id) || prefix.is_some_and(|prefix| damaged.id.starts_with(prefix))
    };
    let mut found: Vec<Image> = records.all().filter(fits).collect();
    let damaged: Vec<&Damaged> = records.damaged().filter(fits_damaged).collect();
    match (found.len(), &damaged[..]) {
        (0 | 1, []) => found.pop().map(|image| (image, None)).ok_or_else(not_found),
        (0, [damaged]) => Err(lost(damaged)),
        (count, damaged) => Err(Error::Ambiguous {
            reference: reference.to_owned(),
            count: count + damaged.len(),
        }),
    }
}
