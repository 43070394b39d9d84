//! A mount being served: the session on a /dev/fuse descriptor and what can be asked of it from
//! outside.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use fuser::{BackingId, Config, INodeNo, Notifier, Session, SessionACL};
use nix::errno::Errno;

use super::claims::Claims;
use super::long::Long;
use super::options::SessionOptions;
use super::passing::Passing;
use super::policy::Policy;
use super::seek::{self, Seeker};
use super::session::{Helpers, UnionFs};
use crate::cow::union::Error as UnionError;
use crate::cow::{NodeId, Union};
use crate::sys::{fs, fusectl, process};

/// How long to have the kernel send its dirty pages, and to look for a moment without a request under way. After that every file
/// that it knows loses its pages, of which those that are not dirty are only read again.
const BUSY_AT_MOST: Duration = Duration::from_secs(1);

/// A session whose INIT has been answered.
pub struct Server {
    session: Session<UnionFs>,
    policy: Arc<OnceLock<Policy>>,
    flusher: Flusher,
}

/// Brings what the kernel holds back down to the upper, and has it drop what is out of date. Usable from any thread but a request
/// worker, for the kernel waits for pages that are being read or written.
#[derive(Clone)]
pub struct Flusher {
    union: Arc<Union>,
    passing: Arc<Passing<BackingId>>,
    notifier: Notifier,
    policy: Arc<OnceLock<Policy>>,
    pages_sent: Arc<AtomicU64>,
    /// Where the mount is, and the number of its device there.
    root: Option<(PathBuf, u64)>,
}

impl Server {
    /// Answers the INIT that lies ready on `device`, or waits for it.
    pub fn attach(
        union: Arc<Union>,
        device: OwnedFd,
        options: SessionOptions,
        no_acl: bool,
    ) -> io::Result<Self> {
        let policy = Arc::new(OnceLock::new());
        let (seeker, long) = (Seeker::default(), Long::default());
        let (claims, claimed) = Claims::new();
        let passing = Arc::new(Passing::default());
        let pages_sent = Arc::new(AtomicU64::new(0));
        let filesystem = UnionFs::new(
            union.clone(),
            options,
            no_acl,
            policy.clone(),
            passing.clone(),
            Helpers {
                seeker: seeker.clone(),
                long: long.clone(),
                claims,
                pages_sent: pages_sent.clone(),
            },
        );
        let mut config = Config::default();
        // Who may enter is checked by the kernel, before fuser is asked; of root alone it knows nothing.
        config.acl = match options.root_and_owner {
            true => SessionACL::RootAndOwner,
            false => SessionACL::All,
        };
        let acl = config.acl;
        config.n_threads = Some(options.threads);
        let session = Session::from_fd(filesystem, device, acl, config)?;
        let notifier = session.notifier();
        long.start()?;
        seeker.start(union.clone(), notifier.clone())?;
        claimed.serve(union.clone(), passing.clone(), notifier.clone())?;
        let teller = notifier.clone();
        union.on_side_effect(move |node| {
            // Attributes alone: that never waits for a request, so a worker may say it.
            if let Err(error) = teller.inval_inode(INodeNo(node.0), -1, 0) {
                tracing::debug!(%error, node = node.0, "old attributes could not be dropped");
            }
        });
        Ok(Self {
            session,
            policy: policy.clone(),
            flusher: Flusher {
                union,
                passing,
                notifier,
                policy,
                pages_sent,
                root: None,
            },
        })
    }

    /// What was agreed on with the kernel.
    pub fn policy(&self) -> Policy {
        self.policy.get().copied().unwrap_or(Policy::PLAIN)
    }

    /// A duplicate of the descriptor that the session reads from.
    pub fn device(&self) -> io::Result<OwnedFd> {
        self.session.as_fd().try_clone_to_owned()
    }

    /// For flushing while the session runs.
    pub fn flusher(&self) -> Flusher {
        self.flusher.clone()
    }

    /// Serves until the mount is gone or the connection is aborted.
    pub fn run(self) -> io::Result<()> {
        end_of(self.session.run())
    }
}

/// A read of the device says ENODEV when the mount has gone, which fuser takes for the end, and ECONNABORTED when it went
/// while a request was being handed out (`fuse_dev_do_read`).
fn end_of(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
        result => result,
    }
}

impl Flusher {
    /// Brings up all data that files of the upper still have in lower layers.
    pub fn complete(&self) -> Result<(), UnionError> {
        let complete = || {
            // In a thread of its own, because it lets all requests go first.
            if let Err(error) = process::give_way() {
                tracing::debug!(%error, "the priority of a completion could not be set");
            }
            self.union.complete()
        };
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("plyfs-complete".into());
            let Ok(thread) = builder.spawn_scoped(scope, complete) else {
                return self.union.complete();
            };
            thread.join().unwrap_or_else(|_| {
                Err(UnionError {
                    errno: libc::EIO,
                    context: "the completion panicked".into(),
                })
            })
        })
    }

    /// Leaves the upper as it is from now on.
    pub fn seal(&self) -> Result<(), UnionError> {
        self.union.seal()
    }

    /// Writes every dirty page of files that may be written to the upper, then makes the upper durable.
    pub fn flush(&self) -> Result<(), UnionError> {
        let policy = self.policy.get().copied().unwrap_or(Policy::PLAIN);
        let nodes = match policy.no_open {
            true => self.nodes_with_pages()?,
            false => self.union.writable_nodes(),
        };
        for node in nodes {
            // What is written goes by the number that the names stand for.
            if !self.drop_pages(self.passing.number(node))? {
                break;
            }
        }
        if policy.writeback {
            // The kernel keeps times to itself, also when its pages are written already.
            self.sync_mount("flushing the times of files that were written")?;
        }
        self.union.sync()
    }

    /// The files that may have dirty pages where the kernel opens them by itself. Of one that is written through a mapping alone
    /// nobody knows before its first page comes.
    fn nodes_with_pages(&self) -> Result<Vec<NodeId>, UnionError> {
        let begun = Instant::now();
        loop {
            let before = self.pages_sent.load(Ordering::Acquire);
            // Up to 6.15 the kernel does not wait for what it sends. Since some 6.18.y it also leaves out what would be more than 48
            // requests at a time, for it counts on no FUSE server to keep anything.
            self.sync_mount("flushing the pages of files that are mapped")?;
            if !self.wait_until_idle() || begun.elapsed() > BUSY_AT_MOST {
                return Ok(self.union.known_files());
            }
            if self.pages_sent.load(Ordering::Acquire) == before {
                // With nothing under way it would have sent some, had there been any.
                return Ok(self.union.writable_nodes());
            }
        }
    }

    /// Waits for a moment without a request under way; false if none was seen.
    fn wait_until_idle(&self) -> bool {
        let Some((_, device)) = &self.root else {
            return false;
        };
        let waited = fusectl::wait_until_idle(*device, BUSY_AT_MOST);
        waited.unwrap_or_else(|error| {
            tracing::debug!(%error, "nobody tells whether pages of mapped files are under way");
            false
        })
    }

    /// Has what packed layers hold be read and compared once more, because somebody has mended them: by the union, and by the kernel,
    /// which drops what it keeps of the files, their attributes too.
    pub fn refresh(&self) -> Result<(), UnionError> {
        for node in self.union.refresh() {
            // Under its first number it is read on by those who opened it before it had a second one.
            let second = Some(self.passing.number(node)).filter(|number| *number != node);
            for number in std::iter::once(node).chain(second) {
                if !self.drop_pages(number)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Has the kernel drop the pages of what has this number, dirty ones once they are written; says whether there is a mount.
    fn drop_pages(&self, number: NodeId) -> Result<bool, UnionError> {
        match seek::flush(&self.notifier, INodeNo(number.0)) {
            Ok(()) => Ok(true),
            // With the mount its pages have gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(false),
            Err(error) => Err(UnionError {
                errno: error.raw_os_error().unwrap_or(libc::EIO),
                context: format!("dropping the pages of node {}", number.0).into(),
            }),
        }
    }

    /// The same, of a mount at `path`, whose device has that number.
    pub fn at(self, path: PathBuf, device: u64) -> Self {
        Self {
            root: Some((path, device)),
            ..self
        }
    }

    /// Has the kernel tell all that it keeps to itself. The descriptor is not kept, for it would keep the mount.
    fn sync_mount(&self, what: &'static str) -> Result<(), UnionError> {
        let Some((path, device)) = &self.root else {
            return Ok(());
        };
        let failed = |errno: Errno| UnionError {
            errno: errno as i32,
            context: what.into(),
        };
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let root = fs::open_path(path, flags).map_err(failed)?;
        match fs::fstat(root.as_fd()).map_err(failed)?.st_dev == *device {
            true => fs::syncfs(root.as_fd()).map_err(failed),
            // Taken away meanwhile: with a mount goes all that the kernel knew of it.
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_goes_while_a_request_is_handed_out_has_ended_well() {
        let with = |code| end_of(Err(io::Error::from_raw_os_error(code)));
        assert!(with(libc::ECONNABORTED).is_ok());
        assert!(with(libc::EPERM).is_err() && end_of(Ok(())).is_ok());
    }
}
