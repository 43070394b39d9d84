//! One client of the shim.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Serialize;

use crate::runtime::wire::{self, Decoder, Frame};

/// Output that waits for a client is at most about this much; then its source waits.
pub const OUTPUT_LIMIT: usize = 256 << 10;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// No hello yet.
    New,
    /// Between requests.
    Idle,
    /// A request is under way; the next one waits.
    Busy,
    /// Has asked for the state while the container starts; answered when that is decided.
    Asking,
    /// Waits for the container's end.
    Waiting,
    /// Streams the log from an offset, with or without input to the container.
    Follower {
        /// Where the next record is.
        offset: u64,
        /// It brings input.
        stdin: bool,
    },
    /// Streams an exec.
    Exec {
        /// Which.
        id: u64,
    },
}

/// A connection, and what waits in it in either direction.
#[derive(Debug)]
pub struct Conn {
    /// The socket, not blocking.
    pub stream: UnixStream,
    /// What it is for.
    pub role: Role,
    /// Goes when everything is sent.
    pub closing: bool,
    /// Its client is gone; what it sent before may still be unread.
    pub hung_up: bool,
    decoder: Decoder,
    out: Vec<u8>,
    /// Its client sends no more; it may still read.
    input_ended: bool,
}

impl Conn {
    /// A connection that was just accepted.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            role: Role::New,
            closing: false,
            hung_up: false,
            decoder: Decoder::default(),
            out: Vec::new(),
            input_ended: false,
        })
    }

    /// The next frame that has arrived whole.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame>> {
        self.decoder.next_frame()
    }

    /// Reads what has arrived; `false` at the end of the stream.
    pub fn fill(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 32 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => {
                self.input_ended = true;
                Ok(false)
            }
            Ok(length) => {
                self.decoder.push(&bytes[..length]);
                Ok(true)
            }
            Err(error) if would_block(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Queues a message.
    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        self.out.extend_from_slice(&wire::encode(message)?);
        Ok(())
    }

    /// Queues a log record.
    pub fn send_record(&mut self, record: &[u8]) -> io::Result<()> {
        wire::encode_data(&mut self.out, record)
    }

    /// It may still be read from.
    pub fn reads(&self) -> bool {
        !self.input_ended
    }

    /// Something waits to be sent.
    pub fn pending(&self) -> bool {
        !self.out.is_empty()
    }

    /// More output may be queued.
    pub fn has_room(&self) -> bool {
        self.out.len() < OUTPUT_LIMIT
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        let result = loop {
            match self.stream.write(&self.out[sent..]) {
                Ok(0) => break Ok(()),
                Ok(length) => sent += length,
                Err(error) if would_block(&error) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.out.drain(..sent);
        result
    }

    /// Nothing is left to do with it.
    pub fn finished(&self) -> bool {
        (self.input_ended && self.hung_up) || (self.closing && self.out.is_empty())
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
