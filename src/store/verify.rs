//! Verification: whether everything that was stored is what it was.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Error, Result, io_error};
use super::format::tables::Object;
use super::format::{LayerName, ObjectName, ViewKey};
use super::ingest::Observer;
use super::ingest::recipe;
use super::layer::index::{Action, LayerIndex};
use super::layers::{ASIDE, Layers};
use super::object::Seen;
use super::view::{self, Verify, View};

/// Something that is not what it was.
#[derive(Debug)]
pub struct Fault {
    /// The layer that needs it; `None` for a pack that is damaged itself, whatever the contents in it are.
    pub layer: Option<LayerName>,
    /// The path in the layer, if it is a content; escaped.
    pub path: Option<String>,
    /// What is wrong.
    pub error: Error,
}

/// A merged view that is not what was written.
#[derive(Debug)]
pub struct BadView {
    /// Where it lies.
    pub path: PathBuf,
    /// What its name says that it is the view of.
    pub key: ViewKey,
    /// The layers of that chain, the lowest first, if the view can still tell.
    pub layers: Option<Vec<LayerName>>,
    /// Another has taken its place, and only who had it mounted before has it.
    pub replaced: bool,
    /// What is wrong.
    pub error: Error,
}

/// Whoever wants to know what a verification finds.
pub trait Told: Observer {
    /// Something is not sound.
    fn fault(&self, fault: Fault);
    /// So many layers of all, contents and their bytes were looked at. Told after each layer, and at the end.
    fn sum(&self, layers: u64, total: u64, objects: u64, bytes: u64);
}

/// A look at layers, one after the other.
pub(super) struct Examination<'a> {
    reads: Reads,
    observer: &'a dyn Observer,
    objects: u64,
    bytes: u64,
    seen: Seen,
    /// An object of several layers is read once, and its damage told for each.
    known: HashMap<ObjectName, Option<Bad>>,
}

/// Which contents are read and compared with their names. Of others it is looked whether their files are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reads {
    /// Those that were damaged or missing when they were last looked at.
    Doubted,
    /// All of them.
    All,
}

impl Reads {
    fn of(deep: bool) -> Self {
        match deep {
            true => Self::All,
            false => Self::Doubted,
        }
    }
}

/// What is wrong with an object, as [`Error::Content`] has it.
#[derive(Clone, Debug)]
struct Bad {
    object: Option<String>,
    problem: String,
    cause: String,
}

impl Layers {
    /// Reads the record, the index and the recipe of every layer and looks for all contents; with `deep`, or where it was damaged
    /// or missing when it was last looked at, reads each of these and compares it with its name. Reads headers and tables of packs,
    /// too. Layers that are removed meanwhile are passed over. Ends early when `told` wants that, and fails where descriptors or
    /// memory are lacking for a look: that is no damage.
    pub fn verify(&self, deep: bool, told: &dyn Told) -> Result<()> {
        let tell = |fault: Fault| match fault.error.is_exhaustion() {
            true => Err(fault.error),
            false => {
                told.fault(fault);
                Ok(())
            }
        };
        let mut first = self.pack_problems().chain(self.verify_records());
        first.try_for_each(tell)?;
        let recorded = self.list().into_iter().map(|(layer, _)| layer);
        let layers: Vec<_> = recorded.chain(self.damaged()).collect();
        let total = layers.len() as u64;
        let mut examination = Examination::new(Reads::of(deep), told);
        told.sum(0, total, 0, 0);
        for (done, layer) in (1..).zip(layers) {
            let faults = examination.layer(self, layer);
            if told.cancelled() {
                return Ok(());
            }
            // Removed meanwhile, it has nothing to be sound.
            if self.expects(layer) {
                if deep || !faults.is_empty() {
                    self.remember_faults(layer, &faults);
                }
                faults.into_iter().try_for_each(tell)?;
            }
            if done < total {
                told.sum(done, total, examination.objects, examination.bytes);
            }
        }
        // The last sum follows all that is told.
        self.bad_copies().try_for_each(tell)?;
        told.sum(total, total, examination.objects, examination.bytes);
        Ok(())
    }

    /// Reads headers and tables of packs, which one can do without if the other is sound. Bad copies are told of which it is known
    /// that there are good ones.
    pub fn verify_packs(&self) -> Vec<Fault> {
        self.pack_problems().chain(self.bad_copies()).collect()
    }

    fn pack_problems(&self) -> impl Iterator<Item = Fault> {
        let problems = self.objects().pack_problems();
        let problems = problems.unwrap_or_else(|error| vec![error]);
        problems.into_iter().map(of_no_layer)
    }

    fn bad_copies(&self) -> impl Iterator<Item = Fault> {
        self.objects().bad_copies().into_iter().map(of_no_layer)
    }

    /// What others than plyd have put where it keeps packs and objects, a sentence for each of the two.
    pub fn foreign(&self) -> Result<Vec<String>> {
        let (beside_packs, beside_files) = self.objects().foreign()?;
        let told = |paths: Vec<PathBuf>| {
            let first = paths.iter().min()?.display().to_string();
            Some(match paths.len() {
                1 => format!(
                    "{first} is not plyd's: it is neither read nor collected, and can be moved away"
                ),
                count => format!(
                    "{count} files are not plyd's, first {first}: they are neither read nor collected, and can be moved away"
                ),
            })
        };
        Ok([beside_packs, beside_files]
            .into_iter()
            .filter_map(told)
            .collect())
    }

    /// Reads the records of layers, and looks for those that should be there.
    fn verify_records(&self) -> Vec<Fault> {
        let damaged = match self.damaged_records() {
            Ok(damaged) => damaged,
            Err(error) => return vec![of_no_layer(error)],
        };
        let faults = damaged.into_iter().filter_map(|damaged| {
            // Another name is no layer's.
            let layer = damaged.id.parse().ok()?;
            Some(Fault {
                layer: Some(layer),
                path: None,
                error: Error::Record(damaged.into()),
            })
        });
        faults.collect()
    }

    /// Reads all of the merged views in which whoever mounts a chain looks for it. One that is replaced or removed meanwhile is
    /// passed over. Ends early when `observer` wants that, and fails as [`verify`](Self::verify) does.
    pub fn verify_views(&self, observer: &dyn Observer) -> Result<Vec<BadView>> {
        let dir = self.views();
        let mut bad = Vec::new();
        let entries = fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for entry in entries.map_err(io_error("list", &dir))? {
            if observer.cancelled() {
                break;
            }
            let path = entry.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let replaced = path.extension().is_some_and(|ending| ending == ASIDE);
            let stem = match replaced {
                true => stem.and_then(|stem| Some(stem.split_once('-')?.0)),
                false => stem,
            };
            let Some(key) = stem.and_then(|stem| stem.parse().ok()) else {
                continue;
            };
            // Once nobody has it any more it is only waiting for a collection.
            if replaced {
                match view::claim(&path) {
                    Ok(Some(_)) => continue,
                    Err(error) if error.is_not_found() => continue,
                    Err(error) if error.is_exhaustion() => return Err(error),
                    // Somebody has it, or nobody can tell.
                    Ok(None) | Err(_) => {}
                }
            }
            let examine = || {
                View::open(&path, key, Arc::clone(self.objects()), Verify::Never)
                    .and_then(|view| view.verify())
            };
            // Twice: what was read first may have been replaced since.
            let error = match examine().or_else(|_| examine()) {
                // One of another release is not used, and built again.
                Ok(()) | Err(Error::Unsupported { .. }) => continue,
                Err(error) if error.is_not_found() => continue,
                Err(error) if error.is_exhaustion() => return Err(error),
                Err(error) => error,
            };
            let layers = view::chain_of(&path).ok();
            bad.push(BadView {
                layers: layers.filter(|layers| ViewKey::of(layers) == key),
                path,
                key,
                replaced,
                error,
            });
        }
        Ok(bad)
    }

    /// As [`verify`](Self::verify), of one layer, whether it is known or not.
    pub fn verify_layer(
        &self,
        layer: LayerName,
        deep: bool,
        observer: &dyn Observer,
    ) -> Vec<Fault> {
        let faults = Examination::new(Reads::of(deep), observer).layer(self, layer);
        if deep && !observer.cancelled() {
            self.remember_faults(layer, &faults);
        }
        faults
    }
}

impl<'a> Examination<'a> {
    /// Nothing was looked at yet.
    pub(super) fn new(reads: Reads, observer: &'a dyn Observer) -> Self {
        Self {
            reads,
            observer,
            objects: 0,
            bytes: 0,
            seen: Seen::default(),
            known: HashMap::new(),
        }
    }

    /// What is not sound of a layer.
    pub(super) fn layer(&mut self, layers: &Layers, layer: LayerName) -> Vec<Fault> {
        let index = LayerIndex::open(&layers.index_path(layer), layer)
            .and_then(|index| index.verify().map(|()| index));
        let fault = |path, error| Fault {
            layer: Some(layer),
            path,
            error,
        };
        let index = match index {
            Ok(index) => index,
            Err(error) => return vec![fault(None, error)],
        };
        let mut faults = Vec::new();
        if index.diff_id().is_some() {
            let path = layers.recipe_path(layer);
            let recipe = recipe::Reader::open(&path).and_then(recipe::Reader::verify);
            faults.extend(recipe.err().map(|error| fault(None, error)));
        }
        let bad = match self.bad_objects(layers, &index) {
            Ok(bad) => bad,
            Err(error) => {
                faults.push(fault(None, error));
                return faults;
            }
        };
        let mut paths = paths_of(&index, &bad);
        let bad = bad.into_iter().map(|(number, bad)| {
            let Bad {
                object,
                problem,
                cause,
            } = bad;
            let error = Error::Content {
                object,
                problem,
                cause,
            };
            fault(paths.remove(&number), error)
        });
        faults.extend(bad);
        faults
    }

    /// The objects of a layer that are not sound, by their numbers. Fails where nobody could look.
    fn bad_objects(&mut self, layers: &Layers, index: &LayerIndex) -> Result<Vec<(u32, Bad)>> {
        let mut bad = Vec::new();
        let told = |object: Option<&Object>, error: Error| Bad {
            object: object.map(|object| object.name.to_string()),
            problem: error.problem(),
            cause: cause(&error, layers.objects().packs()),
        };
        for number in 0..index.object_count() {
            if self.observer.cancelled() {
                break;
            }
            let object = match index.object(number) {
                Ok(object) => object,
                Err(error) => {
                    bad.push((number, told(None, error)));
                    continue;
                }
            };
            let problem = match self.known.get(&object.name) {
                Some(known) => known.clone(),
                None => {
                    self.objects += 1;
                    self.bytes += match self.reads {
                        Reads::All => object.size,
                        Reads::Doubted => 0,
                    };
                    let problem = match self.check_object(layers, &object) {
                        Ok(()) => None,
                        Err(error) if error.is_exhaustion() => return Err(error),
                        Err(error) => Some(told(Some(&object), error)),
                    };
                    self.known.insert(object.name, problem.clone());
                    problem
                }
            };
            bad.extend(problem.map(|problem| (number, problem)));
        }
        Ok(bad)
    }

    fn check_object(&self, layers: &Layers, object: &Object) -> Result<()> {
        let objects = layers.objects();
        let has_to_read = match self.reads {
            Reads::Doubted => objects.is_doubted(&object.name),
            Reads::All => true,
        };
        let found = match objects.find(&object.name) {
            Ok(Some(_)) if has_to_read => objects.read_copies(object),
            Ok(Some(_)) => objects.look_for(object, &self.seen),
            Ok(None) => Err(Error::NoObject {
                object: object.name.to_string(),
            }),
            Err(error) => Err(error),
        };
        match &found {
            Ok(()) if has_to_read => objects.trust(&object.name),
            Ok(()) => {}
            Err(error) if error.is_exhaustion() => {}
            Err(_) => objects.doubt(object.name),
        }
        found
    }
}

fn of_no_layer(error: Error) -> Fault {
    Fault {
        layer: None,
        path: None,
        error,
    }
}

/// What an object has in common with others of which the file that they are in is the cause, in words that follow these.
fn cause(error: &Error, packs: &Path) -> String {
    let in_pack = |path: &Path| match path.starts_with(packs) {
        true => format!("in the pack {}", path.display()),
        false => "in files of their own".to_owned(),
    };
    match error {
        Error::NoObject { .. } => "are in no pack and no file of the store".to_owned(),
        error @ Error::Io { path, .. } if error.is_not_found() => match path.starts_with(packs) {
            true => format!("are gone with the pack {}", path.display()),
            false => "are gone with the files that they were in".to_owned(),
        },
        Error::Io { path, source, .. } => format!("{} cannot be read: {source}", in_pack(path)),
        Error::Damaged { path, .. } => format!("{} are damaged", in_pack(path)),
        Error::Unsupported { path, .. } => {
            format!("{} need a newer release of Plywood", in_pack(path))
        }
        other => format!("cannot be used: {}", other.problem()),
    }
}

/// A path for each of the objects.
fn paths_of(index: &LayerIndex, bad: &[(u32, Bad)]) -> HashMap<u32, String> {
    let wanted: HashSet<u32> = bad.iter().map(|(number, _)| *number).collect();
    let mut paths = HashMap::new();
    if wanted.is_empty() {
        return paths;
    }
    for number in 0..index.len() {
        let found = index.entry(number).and_then(|entry| {
            let extents = match entry.action != Action::Link && entry.inode.kind() == libc::S_IFREG
            {
                true => index.extents(&entry.inode)?,
                false => Vec::new(),
            };
            Ok((entry.path, extents))
        });
        // What cannot be read here was told when the index was verified.
        let Ok((path, extents)) = found else { continue };
        for extent in extents {
            if wanted.contains(&extent.object)
                && !paths.contains_key(&extent.object)
                && let Ok(path) = index.path(path)
            {
                let path = path.join(&b'/').escape_ascii().to_string();
                paths.insert(
                    extent.object,
                    Path::new("/").join(path).display().to_string(),
                );
            }
        }
    }
    paths
}
