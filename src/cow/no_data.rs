//! What stands below a file of a lower layer whose data is in no layer: all of it can be told but the data, so it can be
//! looked at and removed.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use nix::errno::Errno;

use super::error::{Context, Error, Result};
use super::lower::{DirMarks, ListedKind, LowerEntry, LowerFile, LowerObject, Stored};
use super::origin::Origin;
use super::types::Attr;

/// Data that is missing, of this file.
pub(super) struct NoData(pub(super) Arc<dyn LowerObject>);

fn missing<T>() -> Result<T> {
    Err::<T, Error>(Errno::EIO.into())
        .context("the data of a file in a lower layer is missing from the layers below")
}

impl LowerObject for NoData {
    fn attr(&self) -> Result<Attr> {
        self.0.attr()
    }

    fn number_space(&self) -> u64 {
        self.0.number_space()
    }

    fn lookup(self: Arc<Self>, name: &OsStr) -> Result<Option<LowerEntry>> {
        Arc::clone(&self.0).lookup(name)
    }

    fn list(&self, sink: &mut dyn FnMut(&OsStr, ListedKind, u64)) -> Result<()> {
        self.0.list(sink)
    }

    fn marks(&self) -> Result<DirMarks> {
        self.0.marks()
    }

    fn metacopy(&self) -> Result<Option<DirMarks>> {
        self.0.metacopy()
    }

    fn readlink(&self) -> Result<OsString> {
        self.0.readlink()
    }

    fn xattr(&self, stored: &OsStr) -> Result<Vec<u8>> {
        self.0.xattr(stored)
    }

    fn xattr_names(&self) -> Result<Vec<OsString>> {
        self.0.xattr_names()
    }

    fn open(&self) -> Result<Arc<dyn LowerFile>> {
        missing()
    }

    fn stored(&self) -> Result<Option<Stored>> {
        missing()
    }

    fn protection(&self) -> Result<&'static str> {
        self.0.protection()
    }

    fn origin(&self) -> Option<Origin> {
        self.0.origin()
    }
}
