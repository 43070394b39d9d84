//! A large content on its way: cut into frames, which the workers hash and compress, and written by whoever hands it over.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::sink::{Job, ended_early};
use crate::store::error::{Result, io_error};
use crate::store::object::{FRAME, Frame, FrameWriter, NewFile};

/// Frames that the workers have at a time.
const MOST_OUT: usize = 8;

/// A large content that is being handed over.
#[derive(Debug)]
pub(super) struct Large {
    tmp: PathBuf,
    writer: FrameWriter,
    size: u64,
    /// Where the frame at hand starts.
    start: u64,
    frame: Vec<u8>,
    /// Where each frame that the workers have comes from, in their order.
    out: VecDeque<Receiver<io::Result<Frame>>>,
    jobs: Sender<Job>,
}

impl Large {
    /// Begins a content of `size` bytes in `tmp`, all of which have to follow.
    pub(super) fn create(tmp: &Path, size: u64, jobs: &Sender<Job>) -> Result<Self> {
        Ok(Self {
            tmp: tmp.to_owned(),
            writer: FrameWriter::create(tmp, size)?,
            size,
            start: 0,
            frame: Vec::new(),
            out: VecDeque::new(),
            jobs: jobs.clone(),
        })
    }

    /// Adds bytes.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = (FRAME - self.frame.len()).min(bytes.len());
            self.frame.extend_from_slice(&bytes[..room]);
            bytes = &bytes[room..];
            if self.frame.len() == FRAME {
                self.hand_out()?;
            }
        }
        Ok(())
    }

    /// Ends the content.
    pub(super) fn finish(mut self) -> Result<NewFile> {
        if !self.frame.is_empty() {
            self.hand_out()?;
        }
        while !self.out.is_empty() {
            self.take_back()?;
        }
        if self.start != self.size {
            let error = io::Error::other("a content has not as many bytes as it was to have");
            return Err(io_error("write below", &self.tmp)(error));
        }
        self.writer.finish()
    }

    fn hand_out(&mut self) -> Result<()> {
        if self.out.len() == MOST_OUT {
            self.take_back()?;
        }
        let (reply, receiver) = bounded(1);
        let content = std::mem::replace(&mut self.frame, Vec::with_capacity(FRAME));
        let place = (self.start, self.size);
        self.start += content.len() as u64;
        let job = Job::Frame {
            content,
            place,
            reply,
        };
        // Whoever does not listen any more has the reason.
        self.jobs.send(job).map_err(|_| ended_early(&self.tmp))?;
        self.out.push_back(receiver);
        Ok(())
    }

    fn take_back(&mut self) -> Result<()> {
        let Some(receiver) = self.out.pop_front() else {
            return Ok(());
        };
        let frame = receiver.recv().map_err(|_| ended_early(&self.tmp))?;
        self.writer
            .append(&frame.map_err(io_error("compress an object for", &self.tmp))?)
    }
}
