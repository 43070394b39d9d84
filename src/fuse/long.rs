//! Requests that may take long: waiting for the disk, copying much.
//!
//! A few threads answer all requests, and one that waits for the disk is missing for everybody else's. So these
//! requests are done and answered by threads of their own; the kernel does not mind by whom.

use std::sync::{Arc, OnceLock};
use std::thread;

use crossbeam::channel::{self, Sender};

use super::session::guarded;

/// So many are under way at a time; more wait for each other, and for nobody else.
const THREADS: usize = 4;

struct Job {
    operation: &'static str,
    work: Box<dyn FnOnce() + Send>,
}

impl Job {
    fn run(self) {
        guarded(self.operation, self.work);
    }
}

/// Does long work outside of the threads that answer requests.
#[derive(Clone, Default)]
pub struct Long {
    queue: Arc<OnceLock<Sender<Job>>>,
}

impl Long {
    /// Starts the threads. They end when the last `Long` is gone.
    pub fn start(&self) -> std::io::Result<()> {
        let (sender, jobs) = channel::unbounded::<Job>();
        for _ in 0..THREADS {
            let jobs = jobs.clone();
            thread::Builder::new()
                .name("plyfs-long".into())
                .spawn(move || jobs.into_iter().for_each(Job::run))?;
        }
        // A second start would only leave the first threads in charge.
        let _ = self.queue.set(sender);
        Ok(())
    }

    /// Has `work` done, which answers its request itself. Without threads it is done here.
    pub fn run(&self, operation: &'static str, work: impl FnOnce() + Send + 'static) {
        let job = Job {
            operation,
            work: Box::new(work),
        };
        match self.queue.get() {
            Some(queue) => {
                if let Err(unsent) = queue.send(job) {
                    unsent.into_inner().run();
                }
            }
            None => job.run(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_elsewhere_and_a_panic_in_it_ends_nothing() {
        let long = Long::default();
        let here = thread::current().id();
        let (sender, done) = channel::unbounded();
        let tell = sender.clone();
        long.run("before the start", move || {
            tell.send(thread::current().id()).unwrap();
        });
        assert_eq!(done.recv().unwrap(), here);
        long.start().unwrap();
        for _ in 0..2 * THREADS {
            long.run("a panic", || panic!("as it should"));
            let tell = sender.clone();
            long.run("after it", move || {
                tell.send(thread::current().id()).unwrap();
            });
            assert_ne!(done.recv().unwrap(), here);
        }
    }
}
