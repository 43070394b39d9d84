//! A layer's stream on its way out: compressed, and hashed on both sides of that.

use std::io::{self, Write};

use flate2::GzBuilder;
use sha2::{Digest, Sha256};
use tonic::Status;

/// The type that containerd asks for when it asks for none.
pub(super) const OCI_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// What a layer came to be.
#[derive(Clone, Debug)]
pub(super) struct Made {
    /// `sha256:` and the hash of what was written.
    pub(super) digest: String,
    /// Its bytes.
    pub(super) size: u64,
    /// `sha256:` and the hash of the stream before it was compressed.
    pub(super) diff_id: String,
}

impl Compression {
    /// That of a layer of the media type.
    pub(super) fn of(media_type: &str) -> Option<Self> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar" => Some(Self::None),
            OCI_GZIP | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Some(Self::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Writes what `layer` writes to `out`, compressed. The same stream is always the same bytes.
    pub(super) fn write<E: Into<Status>>(
        self,
        out: impl Write,
        layer: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<Made, Status> {
        let out = Hashed::new(out);
        let failed =
            |error: io::Error| Status::internal(format!("cannot compress the layer: {error}"));
        let (content, out) = match self {
            Self::None => {
                let mut content = Hashed::new(out);
                layer(&mut content).map_err(Into::into)?;
                content.finish()
            }
            Self::Gzip => {
                let gzip = GzBuilder::new().write(out, flate2::Compression::default());
                let mut content = Hashed::new(gzip);
                layer(&mut content).map_err(Into::into)?;
                let (content, gzip) = content.finish();
                (content, gzip.finish().map_err(failed)?)
            }
            Self::Zstd => {
                let mut zstd = zstd::Encoder::new(out, 0).map_err(failed)?;
                zstd.include_checksum(true).map_err(failed)?;
                let mut content = Hashed::new(zstd);
                layer(&mut content).map_err(Into::into)?;
                let (content, zstd) = content.finish();
                (content, zstd.finish().map_err(failed)?)
            }
        };
        let size = out.bytes;
        let (digest, mut out) = out.finish();
        out.flush().map_err(failed)?;
        Ok(Made {
            digest,
            size,
            diff_id: content,
        })
    }
}

/// Counts and hashes what passes through.
struct Hashed<W> {
    out: W,
    hash: Sha256,
    bytes: u64,
}

impl<W> Hashed<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    fn finish(self) -> (String, W) {
        (format!("sha256:{:x}", self.hash.finalize()), self.out)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn both_digests_are_those_of_the_bytes() {
        let sum = |bytes: &[u8]| format!("sha256:{:x}", Sha256::digest(bytes));
        let content = b"layer".repeat(100_000);
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let mut out = Vec::new();
            let write = |out: &mut dyn Write| {
                out.write_all(&content)
                    .map_err(|error| Status::internal(error.to_string()))
            };
            let made = compression.write(&mut out, write).unwrap();
            assert_eq!(made.digest, sum(&out));
            assert_eq!((made.size, made.diff_id), (out.len() as u64, sum(&content)));
            let mut read = Vec::new();
            match compression {
                Compression::None => read.clone_from(&out),
                Compression::Gzip => {
                    let mut gzip = flate2::read::GzDecoder::new(&*out);
                    gzip.read_to_end(&mut read).unwrap();
                }
                Compression::Zstd => read = zstd::decode_all(&*out).unwrap(),
            }
            assert!(read == content);
        }
    }
}
