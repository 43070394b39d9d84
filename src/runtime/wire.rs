//! What plyd and a shim say to each other over the shim's socket.
//!
//! A message is a frame: the length of its payload (4 bytes, little endian), one byte that tells its
//! kind, and the payload. Kind 0 is one JSON object, a [`Request`] towards the shim or a [`Reply`] from it; kind
//! 1 is raw: input towards the process, or a record of the log ([`super::log`]) from it.
//!
//! Both sides open with `Hello`; either hangs up on a version that it does not know. A connection then
//! carries one request at a time, or, after `Attach`, `Follow` and `Exec`, one stream until `Exit`.

use std::io;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::state::RunState;

/// Version of the protocol.
pub const VERSION: u32 = 1;
/// Most bytes of a payload. The longest is an `Exec` with its arguments and environment.
pub const LONGEST: usize = 8 << 20;
/// Bytes before a payload.
const PREFIX: usize = 5;

/// A terminal's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What plyd asks of a shim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The first message.
    Hello {
        /// [`VERSION`].
        version: u32,
    },
    /// Answered with `State`; while the container is being started, when that is decided.
    State,
    /// Creates and starts the container's process. Answered with `State` or `Refused`.
    Start {
        /// First size of its terminal.
        window: Option<Window>,
    },
    /// Sends a signal to the container's process. Answered with `Done` or `Refused`.
    Signal {
        /// Its number.
        signal: i32,
    },
    /// Answered with `Exit` when the container has ended.
    Wait,
    /// Output of the container from now on, and input to it. Answered with `Attached`.
    Attach {
        /// The connection will carry input.
        stdin: bool,
    },
    /// The log from `offset` on, without an end until the container's. Answered with `Attached`.
    Follow {
        /// Where a record begins.
        offset: u64,
    },
    /// Runs one more process. Answered with `Attached` or `Refused`.
    Exec {
        /// The OCI runtime specification's `process` object.
        process: serde_json::Value,
        /// The connection will carry input; without it the process reads /dev/null.
        stdin: bool,
        /// First size of its terminal.
        window: Option<Window>,
    },
    /// In a stream with input: there is no more. Not answered.
    CloseStdin,
    /// In a stream: the terminal's new size. Not answered.
    Resize(Window),
    /// In a stream: a signal for its process. Not answered.
    SignalStream {
        /// Its number.
        signal: i32,
    },
    /// Ends the shim of a container that does not run. Answered with `Done` or `Refused`.
    Shutdown,
}

/// What a shim answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The answer to `Hello`.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Process id of the shim.
        pid: u32,
    },
    /// How the container is.
    State(RunState),
    /// It is done.
    Done,
    /// It could not be done.
    Refused {
        /// What `run` or `exec` should exit with: 125, 126 or 127.
        exit_code: i32,
        /// Why, in a sentence.
        message: String,
    },
    /// The stream is open; nothing that comes from now on is lost.
    Attached {
        /// Where in the log it begins; 0 for an exec.
        offset: u64,
    },
    /// The process has ended; no more output will come.
    Exit {
        /// Its exit code, or 128 and the signal's number.
        code: i32,
        /// The kernel killed it for want of memory.
        oom_killed: bool,
        /// When.
        finished: SystemTime,
    },
}

/// A frame taken from a byte stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// JSON.
    Message(Vec<u8>),
    /// Input or a log record.
    Data(Vec<u8>),
}

impl Frame {
    /// The message in it, if it is one of the sort that the receiver expects.
    pub fn message<T: for<'a> Deserialize<'a>>(&self) -> io::Result<T> {
        match self {
            Self::Message(json) => serde_json::from_slice(json).map_err(invalid),
            Self::Data(_) => Err(invalid("data where a message was expected")),
        }
    }
}

/// The frame of a message.
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(message).map_err(invalid)?;
    let mut frame = prefix(0, json.len())?.to_vec();
    frame.extend_from_slice(&json);
    Ok(frame)
}

/// Appends a frame of raw bytes to `out`.
pub fn encode_data(out: &mut Vec<u8>, data: &[u8]) -> io::Result<()> {
    out.extend_from_slice(&prefix(1, data.len())?);
    out.extend_from_slice(data);
    Ok(())
}

fn prefix(kind: u8, length: usize) -> io::Result<[u8; PREFIX]> {
    match u32::try_from(length) {
        Ok(short) if length <= LONGEST => {
            let [a, b, c, d] = short.to_le_bytes();
            Ok([a, b, c, d, kind])
        }
        _ => Err(invalid(format!("a message of {length} bytes is too long"))),
    }
}

/// Cuts a stream of bytes into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, if there is one.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame>> {
        let rest = &self.bytes[self.taken..];
        let Some((&[a, b, c, d, kind], rest)) = rest.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).map_err(invalid)?;
        if length > LONGEST || kind > 1 {
            return Err(invalid("the peer does not speak the shim's protocol"));
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken += PREFIX + length;
        Ok(Some(match kind {
            0 => Frame::Message(payload),
            _ => Frame::Data(payload),
        }))
    }
}

fn invalid(problem: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_cut_of_the_stream() {
        let mut bytes = encode(&Request::Attach { stdin: true }).unwrap();
        encode_data(&mut bytes, b"input").unwrap();
        bytes.extend(encode(&Request::CloseStdin).unwrap());
        for piece in 1..bytes.len() {
            let mut decoder = Decoder::default();
            let mut frames = Vec::new();
            for part in bytes.chunks(piece) {
                decoder.push(part);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    frames.push(frame);
                }
            }
            assert_eq!(frames.len(), 3);
            assert_eq!(
                frames[0].message::<Request>().unwrap(),
                Request::Attach { stdin: true }
            );
            assert_eq!(frames[1], Frame::Data(b"input".to_vec()));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(b"GET / HTTP/1.1\r\n");
        assert!(decoder.next_frame().is_err());
    }
}
