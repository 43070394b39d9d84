//! Contents on their way into the store: hashed and compressed by workers, written to a pack by one thread.
//! Large contents are written by whoever hands them over, in frames that the workers have hashed and compressed.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::Settings;
use super::large::Large;
use crate::store::compression::Compressor;
use crate::store::error::{Error, Result, io_error};
use crate::store::format::ObjectName;
use crate::store::format::tables::Object;
use crate::store::object::{FileWriter, Frame, LARGEST_FRAMED, NewFile, Objects, Seen};
use crate::store::pack::{Encoded, PackWriter};

/// Contents between two threads.
const MOST_WAITING: u64 = 256;

/// What a worker is to do.
#[derive(Debug)]
pub(super) enum Job {
    /// Hash a content, and compress it if it is new.
    Content { number: u32, content: Vec<u8> },
    /// Hash and compress a frame of a large content for whoever waits for it.
    Frame {
        content: Vec<u8>,
        /// Where it starts, and the bytes of the whole.
        place: (u64, u64),
        reply: Sender<io::Result<Frame>>,
    },
}

/// A content whose name is known. It comes with its bytes if the store does not have it.
struct Done {
    number: u32,
    object: Object,
    new: Option<Encoded>,
}

/// What came of the contents of a layer.
#[derive(Debug)]
pub(in crate::store) struct Stored {
    /// Objects by the numbers of contents.
    pub(in crate::store) contents: Vec<Object>,
    /// What is new and small.
    pub(in crate::store) pack: PackWriter,
    /// What is new and large.
    pub(in crate::store) files: Vec<NewFile>,
}

/// Takes the contents of one layer.
pub(super) struct Sink<'a> {
    objects: &'a Objects,
    tmp: &'a Path,
    small: u64,
    plain: bool,
    news: &'a News<'a>,
    jobs: Sender<Job>,
    done: Sender<Done>,
    files: Vec<NewFile>,
    contents: u32,
}

/// What tells which contents are to be kept.
struct News<'a> {
    objects: &'a Objects,
    /// Those that this layer has brought.
    seen: Mutex<HashSet<ObjectName>>,
    /// Of others none is kept.
    only: Option<&'a HashSet<ObjectName>>,
    seen_packs: Seen,
}

impl News<'_> {
    /// Whether neither the store nor this layer has brought the content yet, and it is wanted.
    fn is_new(&self, object: &Object) -> Result<bool> {
        let is_wanted = self.only.is_none_or(|only| only.contains(&object.name));
        Ok(is_wanted
            && self
                .objects
                .find_for_import(object, &self.seen_packs)?
                .is_none()
            && self.seen.lock().insert(object.name))
    }
}

/// A content that is being handed over.
#[derive(Debug)]
pub(super) enum Incoming {
    Small(Vec<u8>),
    Large(Box<Large>),
    /// Large, and to be kept as it is.
    Plain(Box<FileWriter>),
}

/// Calls `fill` with a sink and answers what came of it.
pub(super) fn with_sink<T, E: From<Error>>(
    objects: &Objects,
    tmp: &Path,
    settings: &Settings,
    fill: impl FnOnce(&mut Sink<'_>) -> Result<T, E>,
) -> Result<(T, Stored), E> {
    with_sink_of(objects, None, tmp, settings, fill)
}

/// As [`with_sink`]; of contents that are not in `only` none is kept.
pub(super) fn with_sink_of<T, E: From<Error>>(
    objects: &Objects,
    only: Option<&HashSet<ObjectName>>,
    tmp: &Path,
    settings: &Settings,
    fill: impl FnOnce(&mut Sink<'_>) -> Result<T, E>,
) -> Result<(T, Stored), E> {
    // A quarter of the memory for contents on the way to the workers, as much on the way from them.
    let depth = (settings.memory / 4 / settings.small.max(1)).clamp(2, MOST_WAITING) as usize;
    let (to_workers, jobs) = bounded::<Job>(depth);
    let (to_writer, done) = bounded::<Done>(depth);
    let news = News {
        objects,
        seen: Mutex::default(),
        only,
        seen_packs: Seen::default(),
    };
    let pack = PackWriter::create(tmp)?;
    let spawned = |error| io_error("start a thread for", tmp)(error);
    thread::scope(|scope| {
        let writer = thread::Builder::new()
            .name("layer-pack".to_owned())
            .spawn_scoped(scope, move || write(pack, &done))
            .map_err(spawned)?;
        let mut workers = Vec::new();
        for _ in 0..settings.workers.max(1) {
            let (jobs, to_writer) = (jobs.clone(), to_writer.clone());
            let news = &news;
            let worker = thread::Builder::new()
                .name("layer-worker".to_owned())
                .spawn_scoped(scope, move || work(news, settings.level, &jobs, &to_writer))
                .map_err(spawned)?;
            workers.push(worker);
        }
        drop(jobs);
        let mut sink = Sink {
            objects,
            tmp,
            small: settings.small,
            plain: settings.plain,
            news: &news,
            jobs: to_workers,
            done: to_writer,
            files: Vec::new(),
            contents: 0,
        };
        let filled = fill(&mut sink);
        let Sink {
            jobs,
            done,
            files,
            contents: count,
            ..
        } = sink;
        drop((jobs, done));
        // The first who failed has the reason; those before it in the pipeline only saw its end.
        let (pack, mut contents) = joined(writer.join(), tmp)?;
        for worker in workers {
            joined(worker.join(), tmp)?;
        }
        let filled = filled?;
        contents.sort_unstable_by_key(|(number, _)| *number);
        let contents: Vec<_> = contents.into_iter().map(|(_, object)| object).collect();
        if contents.len() != count as usize {
            return Err(ended_early(tmp).into());
        }
        Ok((
            filled,
            Stored {
                contents,
                pack,
                files,
            },
        ))
    })
}

fn joined<T>(outcome: thread::Result<Result<T>>, tmp: &Path) -> Result<T> {
    outcome.unwrap_or_else(|_| Err(ended_early(tmp)))
}

/// What is said when a thread panicked; its own words are in the log.
pub(super) fn ended_early(tmp: &Path) -> Error {
    io_error("write below", tmp)(io::Error::other("a thread of the import ended early"))
}

impl Sink<'_> {
    /// Begins a content of `size` bytes.
    pub(super) fn begin(&self, size: u64) -> Result<Incoming> {
        if size <= self.small {
            Ok(Incoming::Small(Vec::with_capacity(size as usize)))
        } else if self.plain || size > LARGEST_FRAMED {
            let writer = FileWriter::create(self.tmp)?;
            Ok(Incoming::Plain(Box::new(writer)))
        } else {
            let large = Large::create(self.tmp, size, &self.jobs)?;
            Ok(Incoming::Large(Box::new(large)))
        }
    }

    /// Whether each of those that alone are kept has come.
    pub(super) fn has_all(&self) -> bool {
        let only = self.news.only;
        only.is_some_and(|only| self.news.seen.lock().len() >= only.len())
    }

    /// Keeps a large content if it is new. Whether somebody listens.
    fn file(&mut self, number: u32, file: NewFile) -> Result<bool> {
        let object = file.object;
        if self.news.is_new(&object)? {
            file.start_writing();
            self.files.push(file);
        }
        Ok(self.is_there(number, object))
    }

    /// The number of a content that the store has.
    pub(super) fn known(&mut self, object: Object) -> Result<u32> {
        if self.objects.find_to_name(&object.name)?.is_none() {
            return Err(Error::NoObject {
                object: object.name.to_string(),
            });
        }
        let number = self.next_number();
        let sent = self.is_there(number, object);
        self.answer(number, sent)
    }

    /// Says what a content is that needs no work. Whether somebody listens.
    fn is_there(&self, number: u32, object: Object) -> bool {
        let new = None;
        let done = Done {
            number,
            object,
            new,
        };
        self.done.send(done).is_ok()
    }

    fn next_number(&mut self) -> u32 {
        let number = self.contents;
        self.contents += 1;
        number
    }

    /// Whoever does not listen any more has the reason; see `with_sink`.
    fn answer(&self, number: u32, sent: bool) -> Result<u32> {
        if sent {
            Ok(number)
        } else {
            Err(ended_early(self.tmp))
        }
    }

    /// Ends a content and answers its number.
    pub(super) fn end(&mut self, content: Incoming) -> Result<u32> {
        let number = self.next_number();
        let sent = match content {
            Incoming::Small(content) => {
                let job = Job::Content { number, content };
                self.jobs.send(job).is_ok()
            }
            Incoming::Large(large) => self.file(number, large.finish()?)?,
            Incoming::Plain(writer) => self.file(number, writer.finish()?)?,
        };
        self.answer(number, sent)
    }
}

impl Incoming {
    /// Adds bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Small(content) => {
                content.extend_from_slice(bytes);
                Ok(())
            }
            Self::Large(large) => large.write(bytes),
            Self::Plain(writer) => writer.write(bytes),
        }
    }
}

fn work(news: &News<'_>, level: i32, jobs: &Receiver<Job>, to_writer: &Sender<Done>) -> Result<()> {
    let compressing = |error| io_error("compress an object for", Path::new("a pack"))(error);
    let mut compressor = Compressor::new(level).map_err(compressing)?;
    for job in jobs {
        #[cfg(test)]
        let _noted = tests::Compressing::begin(news.objects);
        let (number, content) = match job {
            Job::Content { number, content } => (number, content),
            Job::Frame {
                content,
                place,
                reply,
            } => {
                // Whoever has given up does not wait for it.
                let _ = reply.send(Frame::new(content, place, &mut compressor));
                continue;
            }
        };
        let object = Object {
            name: ObjectName::of(&content),
            size: content.len() as u64,
        };
        let new = if news.is_new(&object)? {
            let encoded = Encoded::new(object, content, &mut compressor);
            Some(encoded.map_err(compressing)?)
        } else {
            None
        };
        let done = Done {
            number,
            object,
            new,
        };
        if to_writer.send(done).is_err() {
            break;
        }
    }
    Ok(())
}

type Written = (PackWriter, Vec<(u32, Object)>);

fn write(mut pack: PackWriter, done: &Receiver<Done>) -> Result<Written> {
    let mut contents = Vec::new();
    for Done {
        number,
        object,
        new,
    } in done
    {
        if let Some(encoded) = new {
            pack.append(&encoded)?;
        }
        contents.push((number, object));
    }
    Ok((pack, contents))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::thread::ThreadId;
    use std::time::Instant;

    use super::*;

    /// In which thread a worker has done something, from when to when.
    type Job = (ThreadId, Instant, Instant);
    /// What the workers of stores with these packs have done, as long as a test wants to know.
    static WATCHED: Mutex<BTreeMap<PathBuf, Vec<Job>>> = Mutex::new(BTreeMap::new());

    /// A worker is at a content or a frame.
    pub(super) struct Compressing<'a>(&'a Path, Instant);

    impl<'a> Compressing<'a> {
        pub(super) fn begin(objects: &'a Objects) -> Self {
            Self(objects.packs(), Instant::now())
        }
    }

    impl Drop for Compressing<'_> {
        fn drop(&mut self) {
            if let Some(done) = WATCHED.lock().get_mut(self.0) {
                done.push((thread::current().id(), self.1, Instant::now()));
            }
        }
    }

    /// An import that does one content after the other takes as long on many processors as on one, and nothing fails.
    #[test]
    fn several_workers_compress_at_the_same_time() {
        let settings = Settings {
            workers: 4,
            level: 9,
            ..Settings::default()
        };
        // Contents for a pack, and frames of a large one.
        for (contents, bytes) in [(200, settings.small), (1, 200 * settings.small)] {
            let tmp = tempfile::tempdir().unwrap();
            let mut objects = Objects::new(tmp.path());
            objects.prepare().unwrap();
            WATCHED
                .lock()
                .insert(objects.packs().to_owned(), Vec::new());
            let stored = with_sink(&objects, tmp.path(), &settings, |sink| {
                for number in 0..contents {
                    let mut content = sink.begin(bytes)?;
                    for part in 0..bytes / 1024 {
                        let text = format!("{:64}", number * bytes + part * 1024);
                        content.write(text.repeat(16).as_bytes())?;
                    }
                    sink.end(content)?;
                }
                Ok::<_, Error>(())
            });
            assert_eq!(stored.unwrap().1.contents.len() as u64, contents);
            let done = WATCHED.lock().remove(objects.packs()).unwrap();
            assert_eq!(done.len(), 200);
            let threads: HashSet<_> = done.iter().map(|(thread, ..)| thread).collect();
            assert!(threads.len() > 1);
            let at_once = |(thread, begun, ended): &Job| {
                let mut others = done.iter().filter(|other| other.0 != *thread);
                others.any(|(_, from, to)| from < ended && begun < to)
            };
            assert!(done.iter().any(at_once));
        }
    }

    /// A reader takes no frames of more, so such a content was lost as soon as it was stored.
    #[test]
    fn what_is_too_large_for_frames_is_kept_as_it_is() {
        let tmp = tempfile::tempdir().unwrap();
        let objects = Objects::new(tmp.path());
        let begun = with_sink(&objects, tmp.path(), &Settings::default(), |sink| {
            let in_frames = |size| Ok::<_, Error>(matches!(sink.begin(size)?, Incoming::Large(_)));
            Ok::<_, Error>([in_frames(LARGEST_FRAMED)?, in_frames(LARGEST_FRAMED + 1)?])
        });
        assert_eq!(begun.unwrap().0, [true, false]);
    }
}
