//! Streams that may be compressed, whose first bytes tell how, and the frames of zstd that the store keeps.

use std::cell::RefCell;
use std::io::{BufRead, Cursor, Read, Result};

use flate2::bufread::MultiGzDecoder;
use zstd::zstd_safe::WriteBuf;

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// A zstd stream may start with a skippable frame, whose first byte varies.
const ZSTD_SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];

/// The content of `stream`: decompressed if it is gzip of any number of members or zstd of any number
/// of frames, else as it is.
pub(crate) fn decompress<'a>(mut stream: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    let mut start = Vec::with_capacity(4);
    stream.by_ref().take(4).read_to_end(&mut start)?;
    let gzip = start.starts_with(GZIP);
    let zstd = start.starts_with(ZSTD)
        || start.len() == 4 && start[0] & 0xf0 == 0x50 && start.ends_with(ZSTD_SKIPPABLE);
    let whole = Cursor::new(start).chain(stream);
    Ok(if gzip {
        Box::new(MultiGzDecoder::new(whole))
    } else if zstd {
        Box::new(zstd::Decoder::with_buffer(whole)?)
    } else {
        Box::new(whole)
    })
}

/// Makes frames of zstd, with what that takes of memory kept from one to the next.
pub(super) struct Compressor(zstd::bulk::Compressor<'static>);

impl Compressor {
    pub(super) fn new(level: i32) -> Result<Self> {
        zstd::bulk::Compressor::new(level).map(Self)
    }

    pub(super) fn compress(&mut self, content: &[u8]) -> Result<Vec<u8>> {
        self.0.compress(content)
    }
}

/// More than this is not kept from one use of the scratch to the next.
const MOST_SCRATCH: usize = 256 << 10;

thread_local! {
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `job` with so many bytes for what is read and then decompressed, of which nobody knows what is in them.
pub(super) fn with_scratch<T>(bytes: usize, job: impl FnOnce(&mut [u8]) -> T) -> T {
    if bytes > MOST_SCRATCH {
        return job(&mut vec![0; bytes]);
    }
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < bytes {
            scratch.resize(bytes, 0);
        }
        job(&mut scratch[..bytes])
    })
}

/// Decompresses one frame and answers how many bytes it had; more than `into` has room for (a vector: its capacity) are
/// an error.
pub(super) fn decompress_into(frame: &[u8], into: &mut (impl WriteBuf + ?Sized)) -> Result<usize> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let mut decompressor = match kept.take() {
            Some(decompressor) => decompressor,
            None => zstd::bulk::Decompressor::new()?,
        };
        let count = decompressor.decompress_to_buffer(frame, into);
        *kept = Some(decompressor);
        count
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn content(stream: &[u8]) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        decompress(stream)?.read_to_end(&mut content)?;
        Ok(content)
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn all_members_and_frames_are_read() {
        let two = [gzip(b"first "), gzip(b"second")].concat();
        assert_eq!(content(&two).unwrap(), b"first second");
        let frame = |data: &[u8]| zstd::encode_all(data, 1).unwrap();
        let skippable = [0x5a, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, b'!'];
        let frames = [skippable.to_vec(), frame(b"first "), frame(b"second")].concat();
        assert_eq!(content(&frames).unwrap(), b"first second");
        for plain in [&b""[..], b"abc", b"neither of them"] {
            assert_eq!(content(plain).unwrap(), plain);
        }
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        let whole = gzip(&[7; 10_000]);
        for end in 4..whole.len() {
            assert!(content(&whole[..end]).is_err(), "gzip cut at {end}");
        }
        let whole = zstd::encode_all(&[7; 10_000][..], 1).unwrap();
        for end in 4..whole.len() {
            assert!(content(&whole[..end]).is_err(), "zstd cut at {end}");
        }
    }
}
