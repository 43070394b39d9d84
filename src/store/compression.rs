//! Streams that may be compressed, whose first bytes tell how, and the frames of zstd that the store keeps.

use std::cell::RefCell;
use std::io::{self, BufRead, Cursor, Read, Result};

use flate2::bufread::MultiGzDecoder;
use zstd::zstd_safe::{self, WriteBuf, zstd_sys};

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// A zstd stream may start with a skippable frame, whose first byte varies.
const ZSTD_SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];

/// Window of zstd that every decoder has to allow, without `--long` or with it.
pub(crate) const WINDOW: u64 = 128 << 20;
/// Powers of two between which zstd knows windows.
const WINDOW_LOGS: (u32, u32) = (10, 31);

/// The content of `stream`: decompressed if it is gzip of any number of members or zstd of any number
/// of frames, else as it is. A frame of zstd whose window has more than `window` bytes, rounded down to a power of two, is an
/// error of reading of the kind `OutOfMemory`: so much is kept in memory.
pub(crate) fn decompress<'a>(
    mut stream: impl BufRead + 'a,
    window: u64,
) -> Result<Box<dyn Read + 'a>> {
    let mut start = Vec::with_capacity(4);
    stream.by_ref().take(4).read_to_end(&mut start)?;
    let gzip = start.starts_with(GZIP);
    let zstd = start.starts_with(ZSTD)
        || start.len() == 4 && start[0] & 0xf0 == 0x50 && start.ends_with(ZSTD_SKIPPABLE);
    let whole = Cursor::new(start).chain(stream);
    Ok(if gzip {
        Box::new(MultiGzDecoder::new(whole))
    } else if zstd {
        let most = window.max(1).ilog2().clamp(WINDOW_LOGS.0, WINDOW_LOGS.1);
        let mut decoder = zstd::Decoder::with_buffer(whole)?;
        decoder.window_log_max(most)?;
        Box::new(Windowed { decoder, most })
    } else {
        Box::new(whole)
    })
}

/// A stream of zstd that says what it would take to read it.
struct Windowed<R> {
    decoder: R,
    /// Logarithm of the largest window.
    most: u32,
}

impl<R: Read> Read for Windowed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.decoder.read(buffer).map_err(|error| {
            let code = zstd_sys::ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge as usize;
            // The library answers errors as negative numbers, and the binding keeps their names alone.
            if error.to_string() != zstd_safe::get_error_name(code.wrapping_neg()) {
                return error;
            }
            let most = 1u64 << self.most;
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("a frame of zstd needs a window of more than {most} bytes of memory"),
            )
        })
    }
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

    /// Bytes of memory that making frames of contents of so many bytes takes, without the contents.
    pub(super) fn memory(level: i32, content: u64) -> Result<u64> {
        let failed = |code| io::Error::other(zstd_safe::get_error_name(code));
        let mut context = zstd_safe::CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        let level = zstd_safe::CParameter::CompressionLevel(level);
        context.set_parameter(level).map_err(failed)?;
        context
            .set_pledged_src_size(Some(content))
            .map_err(failed)?;
        // Only the start of a frame takes what it needs.
        let mut out = [0; 64];
        let mut out = zstd_safe::OutBuffer::around(&mut out[..]);
        let mut start = zstd_safe::InBuffer::around(&[0]);
        context
            .compress_stream(&mut out, &mut start)
            .map_err(failed)?;
        Ok(context.sizeof() as u64)
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
        decompress(stream, WINDOW)?.read_to_end(&mut content)?;
        Ok(content)
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn what_compressing_takes_of_memory_grows_with_level_and_content() {
        let memory = |level, content| Compressor::memory(level, content).unwrap();
        let small = memory(1, 128 << 10);
        assert!((100 << 10..1 << 20).contains(&small), "{small}");
        assert!(memory(22, 128 << 10) > small);
        let large = memory(22, 16 << 20);
        assert!((64 << 20..512 << 20).contains(&large), "{large}");
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

    /// Members and frames that carry none of the layer's bytes, as those have that can be read from within.
    #[test]
    fn estargz_and_zstd_chunked_are_read_as_what_they_are() {
        // Each file is a member of its own; the last is empty and has the place of the index in an extra field.
        let footer = flate2::GzBuilder::new()
            .extra(*b"SG\x16\x000000000000001000STARGZ")
            .write(Vec::new(), flate2::Compression::none())
            .finish()
            .unwrap();
        let estargz = [gzip(b"header "), gzip(b""), gzip(b"content"), footer].concat();
        assert_eq!(content(&estargz).unwrap(), b"header content");
        assert!(content(&estargz[..estargz.len() - 1]).is_err());

        // The index is in a skippable frame, and its place in another one, which is the last.
        let frame = |data: &[u8]| zstd::encode_all(data, 1).unwrap();
        let skippable = |data: &[u8]| {
            let length = (data.len() as u32).to_le_bytes();
            [&[0x50, 0x2a, 0x4d, 0x18][..], &length, data].concat()
        };
        let index = skippable(&frame(b"{\"version\":1}"));
        let footer = skippable(&[b"\0".repeat(56), b"GNUlInUx".to_vec()].concat());
        let chunked = [
            frame(b"header "),
            frame(b""),
            frame(b"content"),
            index,
            footer,
        ]
        .concat();
        assert_eq!(content(&chunked).unwrap(), b"header content");
        assert!(content(&chunked[..chunked.len() - 1]).is_err());
    }

    #[test]
    fn a_frame_takes_no_more_memory_than_is_allowed() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(22).unwrap();
        encoder.write_all(&[7; 100_000]).unwrap();
        let stream = encoder.finish().unwrap();
        let read = |window: u64| {
            let mut content = Vec::new();
            let read = decompress(stream.as_slice(), window)?.read_to_end(&mut content);
            read.map(|_| content.len())
        };
        assert_eq!(read(4 << 20).unwrap(), 100_000);
        let refused = read((4 << 20) - 1).unwrap_err().to_string();
        assert!(refused.contains("more than 2097152 bytes"), "{refused}");
        // No number is too small or too large to be one.
        assert!(read(0).is_err());
        assert_eq!(read(u64::MAX).unwrap(), 100_000);
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
