//! A lower layer that is a directory of the host in overlayfs format: the layer as a whole. What is in it is in `object`.

mod object;

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use self::object::DirObject;
pub(super) use self::object::HostFile;
use super::adopt;
use super::attr::{attr_of, statfs_of};
use super::error::Result;
use super::fdcache::Budget;
use super::lower::{Lower, LowerObject};
use super::origin::Origin;
use super::stat_override::StatOverride;
use super::types::{StatFs, XattrFamily};
use crate::sys::fs::{self, Object};
use crate::sys::{handle, private_mount};

/// What all objects of one layer share.
#[derive(Clone)]
struct Layer {
    family: XattrFamily,
    budget: Arc<Budget>,
    /// Kept open for as long as the layer is used: with it goes the private mount.
    root: Arc<OwnedFd>,
    /// It is reached through a private mount that is read-only.
    sealed: bool,
    dev: u64,
    uuid: [u8; 16],
    decodes: bool,
    /// Whether `.wh.` files and fuse-overlayfs's attributes are marks.
    foreign: bool,
    /// Owners and modes lie in this attribute.
    stat_override: Option<StatOverride>,
    path: PathBuf,
    /// It is the upper of others, which may write to it, with this work directory.
    work: Option<PathBuf>,
}

/// A host directory as a lower layer.
pub(super) struct DirLower {
    layer: Arc<Layer>,
    root: Arc<DirObject>,
}

impl DirLower {
    /// Opens the layers at `paths`, through private read-only mounts where that is allowed. With `work`, the first is the
    /// upper of others.
    pub(super) fn open_all(
        paths: &[PathBuf],
        work: Option<&Path>,
        family: XattrFamily,
        budget: &Arc<Budget>,
    ) -> Vec<std::io::Result<Self>> {
        let mounts = match private_mount::read_only(paths) {
            Ok(mounts) => mounts.into_iter().map(std::io::Result::ok).collect(),
            // Without the privilege the descriptors are opened with O_NOATIME instead.
            Err(error) => {
                tracing::debug!(%error, "lower directories are used without private mounts");
                Vec::new()
            }
        };
        let mut mounts = mounts.into_iter();
        paths
            .iter()
            .enumerate()
            .map(|(n, path)| {
                let work = work.filter(|_| n == 0);
                Self::open(path, work, mounts.next().flatten(), family, budget)
            })
            .collect()
    }

    fn open(
        path: &Path,
        work: Option<&Path>,
        mount: Option<OwnedFd>,
        family: XattrFamily,
        budget: &Arc<Budget>,
    ) -> std::io::Result<Self> {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let sealed = mount.is_some();
        let root = match mount {
            Some(mount) => fs::openat(mount.as_fd(), OsStr::new("."), flags, 0)?,
            None => fs::open_path(path, flags)?,
        };
        let stat = fs::fstat(root.as_fd())?;
        let decodes = handle::of(Object::Open(root.as_fd()))
            .and_then(|own| handle::open(root.as_fd(), &own))
            .is_ok();
        // A file system without attributes has no mark either.
        let dialect = adopt::dialect(root.as_fd(), family).unwrap_or(None);
        let object = Object::Open(root.as_fd());
        let stat_override = dialect.unwrap_or_else(|| StatOverride::of_layer(object));
        let mut attr = attr_of(&stat);
        if let Some(form) = stat_override {
            form.read(object, &mut attr)?;
        }
        let layer = Arc::new(Layer {
            family,
            budget: Arc::clone(budget),
            dev: stat.st_dev,
            uuid: handle::fs_uuid(root.as_fd()),
            root: Arc::new(root),
            sealed,
            decodes,
            foreign: dialect.is_none(),
            stat_override,
            path: path.to_owned(),
            work: work.map(Path::to_owned),
        });
        let root = Arc::new(DirObject::root(Arc::clone(&layer), attr));
        Ok(Self { layer, root })
    }

    /// The index of hard links in the work directory, as a directory of objects of this layer; `None` if there is none.
    pub(super) fn index(&self) -> std::io::Result<Option<Arc<dyn LowerObject>>> {
        let Some(work) = &self.layer.work else {
            return Ok(None);
        };
        let path = work.join("index");
        let root = match fs::open_path(&path, libc::O_RDONLY | libc::O_DIRECTORY) {
            Err(Errno::ENOENT) => return Ok(None),
            root => root?,
        };
        let attr = attr_of(&fs::fstat(root.as_fd())?);
        let layer = Layer {
            root: Arc::new(root),
            sealed: false,
            path,
            ..Layer::clone(&self.layer)
        };
        Ok(Some(Arc::new(DirObject::root(Arc::new(layer), attr))))
    }
}

impl Lower for DirLower {
    fn root(&self) -> Arc<dyn LowerObject> {
        Arc::clone(&self.root) as Arc<dyn LowerObject>
    }

    fn number_space(&self) -> u64 {
        self.layer.dev
    }

    fn decode_origin(&self, origin: &Origin) -> Option<u64> {
        if origin.uuid != self.layer.uuid && origin.uuid != [0; 16] {
            return None;
        }
        let fd = handle::open(self.layer.root.as_fd(), &origin.handle).ok()?;
        let stat = fs::fstat(fd.as_fd()).ok()?;
        (stat.st_dev == self.layer.dev).then_some(stat.st_ino)
    }

    fn decodes_origins(&self) -> bool {
        self.layer.decodes
    }

    fn statfs(&self) -> Result<StatFs> {
        Ok(statfs_of(&fs::fstatvfs(self.layer.root.as_fd())?))
    }
}
