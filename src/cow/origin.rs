//! The name of a lower object as `overlay.origin` and the index store it: kernel overlayfs's
//! `struct ovl_fb` (fs/overlayfs/overlayfs.h), so that a host can change from one to the other.

use std::ffi::OsString;
use std::fmt::Write;

use crate::sys::handle::Handle;

const VERSION: u8 = 0;
const MAGIC: u8 = 0xfb;
const HEADER: usize = 5 + 16;
const FLAG_BIG_ENDIAN: u8 = 1;
const FLAG_ANY_ENDIAN: u8 = 2;
const HOST_ENDIAN: u8 = if cfg!(target_endian = "big") {
    FLAG_BIG_ENDIAN
} else {
    0
};

/// A file handle with the identity of its file system.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// UUID of the file system, zero if it has none to show.
    pub uuid: [u8; 16],
    /// Handle on it.
    pub handle: Handle,
}

impl Origin {
    /// The stored form, if the handle fits into it.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let len = u8::try_from(HEADER + self.handle.data.len()).ok()?;
        let kind = u8::try_from(self.handle.kind).ok()?;
        let mut out = vec![VERSION, MAGIC, len, HOST_ENDIAN, kind];
        out.extend_from_slice(&self.uuid);
        out.extend_from_slice(&self.handle.data);
        Some(out)
    }

    /// Reads the stored form; nothing for one of another version, host or length.
    pub fn decode(stored: &[u8]) -> Option<Self> {
        let (header, data) = stored.split_at_checked(HEADER)?;
        let endian_fits =
            header[3] & FLAG_ANY_ENDIAN != 0 || header[3] & FLAG_BIG_ENDIAN == HOST_ENDIAN;
        if header[0] != VERSION
            || header[1] != MAGIC
            || usize::from(header[2]) != stored.len()
            || !endian_fits
        {
            return None;
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&header[5..]);
        Some(Self {
            uuid,
            handle: Handle {
                kind: i32::from(header[4]),
                data: data.to_vec(),
            },
        })
    }

    /// The name of the index entry: the stored form in hexadecimal.
    pub fn index_name(&self) -> Option<OsString> {
        let stored = self.encode()?;
        let mut name = String::with_capacity(2 * stored.len());
        for byte in stored {
            write!(name, "{byte:02x}").ok()?;
        }
        Some(name.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stored_form_is_the_kernels() {
        let origin = Origin {
            uuid: [7; 16],
            handle: Handle {
                kind: 1,
                data: vec![1, 2, 3, 4, 5, 6, 7, 8],
            },
        };
        let stored = origin.encode().unwrap();
        assert_eq!(&stored[..5], &[0, 0xfb, 29, HOST_ENDIAN, 1]);
        assert_eq!(Origin::decode(&stored), Some(origin.clone()));
        assert_eq!(Origin::decode(&stored[..20]), None);
        assert!(origin.index_name().unwrap().len() == 58);
    }
}
