//! Where a directory (or a file with `metacopy`) continues in the layers below.
//!
//! A layer names the continuation by `overlay.redirect`: a single name stands in place of the object's
//! own in the same parent, a path that begins with `/` starts at the top of each layer below
//! (Documentation/filesystems/overlayfs.rst, "redirect_dir").

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::Result;
use super::lower::{LowerEntry, LowerObject};
use super::no_data::NoData;
use super::node::LowerAt;
use super::types::FileKind;
use super::union::Union;

/// What a search looks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Whatever the topmost layer has.
    Anything,
    /// Directories that merge with one found above.
    Directories,
    /// The data of a file of which only metadata was found above.
    Data,
}

/// What one layer has at a path.
enum Step {
    /// Nothing; the layers below may have something.
    Nothing,
    /// Nothing, and nothing below counts.
    Stop,
    /// This; `goes_on` tells under which path in the layers below, or that it does not. Of a file that has no data here,
    /// the search for it has to go on.
    Found {
        object: Arc<dyn LowerObject>,
        goes_on: Option<Where>,
        has_data: bool,
    },
    /// Nothing here, but a directory on the way is redirected.
    Elsewhere(Where),
}

/// A place in the layers below.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Where {
    /// A name in the same parent.
    Name(OsString),
    /// A path from the top.
    Path(PathBuf),
}

impl Where {
    fn from_redirect(redirect: &Path) -> Option<Self> {
        let bytes = redirect.as_os_str().as_bytes();
        if bytes.starts_with(b"/") {
            Some(Self::Path(redirect.to_owned()))
        } else if !bytes.is_empty() && !bytes.contains(&b'/') && bytes != b"." && bytes != b".." {
            Some(Self::Name(redirect.as_os_str().to_owned()))
        } else {
            None
        }
    }
}

impl Union {
    /// Finds the lower objects that `name` in a directory with these `parents` stands for, topmost
    /// first. `redirect` is what a layer above says instead of the name. Of a file whose data no layer has the last one stands
    /// for the data.
    pub(super) fn find_lowers(
        &self,
        parents: &[LowerAt],
        name: &OsStr,
        redirect: Option<&Path>,
        wanted: Wanted,
    ) -> Result<Vec<LowerAt>> {
        let mut found: Vec<LowerAt> = Vec::new();
        let mut is_whole = true;
        let mut wanted = wanted;
        let mut at = redirect
            .and_then(Where::from_redirect)
            .unwrap_or_else(|| Where::Name(name.to_owned()));
        let mut layer = 0;
        while layer < self.lowers.len() {
            let step = match &at {
                Where::Name(name) => {
                    let Some(parent) = parents.iter().find(|parent| parent.layer >= layer) else {
                        break;
                    };
                    layer = parent.layer;
                    self.step(Arc::clone(&parent.object), name, layer, wanted)?
                }
                Where::Path(path) => self.walk(layer, path, wanted)?,
            };
            match step {
                Step::Nothing => {}
                Step::Stop => break,
                Step::Elsewhere(to) => at = to,
                Step::Found {
                    object,
                    goes_on,
                    has_data,
                } => {
                    is_whole = has_data;
                    if object.attr()?.kind != FileKind::Directory {
                        wanted = Wanted::Data;
                    } else if wanted == Wanted::Anything {
                        wanted = Wanted::Directories;
                    }
                    found.push(LowerAt { layer, object });
                    match goes_on {
                        None => break,
                        Some(to) => at = to,
                    }
                }
            }
            layer += 1;
        }
        if !is_whole && let Some(last) = found.last().cloned() {
            found.push(LowerAt {
                layer: last.layer,
                object: Arc::new(NoData(last.object)),
            });
        }
        Ok(found)
    }

    /// One name in a directory of one layer.
    fn step(
        &self,
        parent: Arc<dyn LowerObject>,
        name: &OsStr,
        layer: usize,
        wanted: Wanted,
    ) -> Result<Step> {
        let object = match parent.lookup(name)? {
            None => return Ok(Step::Nothing),
            Some(LowerEntry::Whiteout) => return Ok(Step::Stop),
            Some(LowerEntry::Object(object)) => object,
        };
        let kind = object.attr()?.kind;
        let fits = match wanted {
            Wanted::Anything => true,
            Wanted::Directories => kind == FileKind::Directory,
            Wanted::Data => kind == FileKind::Regular,
        };
        if !fits {
            return Ok(Step::Stop);
        }
        let same = || Where::Name(name.to_owned());
        let bottom = layer + 1 == self.lowers.len();
        let goes_on = match kind {
            FileKind::Directory if bottom => None,
            FileKind::Directory => {
                let marks = object.marks()?;
                if marks.opaque {
                    None
                } else {
                    let redirect = marks.redirect.as_deref().and_then(Where::from_redirect);
                    Some(redirect.unwrap_or_else(same))
                }
            }
            FileKind::Regular => object.metacopy()?.map(|marks| {
                let redirect = marks.redirect.as_deref().and_then(Where::from_redirect);
                redirect.unwrap_or_else(same)
            }),
            _ => None,
        };
        let has_data = kind == FileKind::Directory || goes_on.is_none();
        Ok(Step::Found {
            object,
            goes_on,
            has_data,
        })
    }

    /// A path from the top of one layer. Directories on the way count as they do in a lookup: what is
    /// opaque or no directory ends the search, what is redirected sends it elsewhere below.
    fn walk(&self, layer: usize, path: &Path, wanted: Wanted) -> Result<Step> {
        let names: Vec<&[u8]> = path
            .as_os_str()
            .as_bytes()
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty())
            .collect();
        let mut object = self.lowers[layer].root();
        let Some((last, way)) = names.split_last() else {
            return Ok(Step::Stop);
        };
        let mut below: Option<Vec<u8>> = None;
        let mut ends = false;
        for (depth, name) in way.iter().enumerate() {
            match self.step(object, OsStr::from_bytes(name), layer, Wanted::Directories)? {
                Step::Nothing | Step::Elsewhere(_) => {
                    if ends {
                        return Ok(Step::Stop);
                    }
                    let Some(mut path) = below else {
                        return Ok(Step::Nothing);
                    };
                    for name in &names[depth..] {
                        path.push(b'/');
                        path.extend_from_slice(name);
                    }
                    return Ok(Step::Elsewhere(Where::Path(
                        OsString::from_vec(path).into(),
                    )));
                }
                Step::Stop => return Ok(Step::Stop),
                Step::Found {
                    object: found,
                    goes_on,
                    ..
                } => {
                    object = found;
                    match goes_on {
                        None => ends = true,
                        Some(Where::Path(path)) => {
                            below = Some(path.into_os_string().into_vec());
                            // A path from the top leads out of the opaque directory above.
                            ends = false;
                        }
                        Some(Where::Name(to)) => {
                            let mut path = below.take().unwrap_or_else(|| join(&way[..depth]));
                            path.push(b'/');
                            path.extend_from_slice(to.as_bytes());
                            below = Some(path);
                        }
                    }
                }
            }
        }
        let parent_below = below.unwrap_or_else(|| join(way));
        let in_parent = |name: &OsStr| {
            let mut path = parent_below.clone();
            path.push(b'/');
            path.extend_from_slice(name.as_bytes());
            Where::Path(OsString::from_vec(path).into())
        };
        Ok(
            match self.step(object, OsStr::from_bytes(last), layer, wanted)? {
                Step::Found {
                    object,
                    goes_on,
                    has_data,
                } => Step::Found {
                    object,
                    has_data,
                    goes_on: match goes_on {
                        Some(Where::Name(_)) if ends => None,
                        Some(Where::Name(name)) => Some(in_parent(&name)),
                        other => other,
                    },
                },
                Step::Nothing if ends => Step::Stop,
                Step::Nothing => Step::Elsewhere(in_parent(OsStr::from_bytes(last))),
                other => other,
            },
        )
    }
}

fn join(names: &[&[u8]]) -> Vec<u8> {
    let mut path = Vec::new();
    for name in names {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    path
}
