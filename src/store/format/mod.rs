//! The words of the on-disk formats, which `docs/layer-format.md` gives byte by byte: numbers,
//! names, features. [`index_file`] is the frame that layers' indexes and views have in common, [`tables`] what
//! both keep in it.

pub(super) mod index_file;
pub(super) mod tables;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::error::{Error, Result};

/// A point in time: seconds since the epoch and nanoseconds, 0 to 999,999,999, counted forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Whole seconds; negative before 1970.
    pub sec: i64,
    /// Nanoseconds after `sec`.
    pub nsec: u32,
}

macro_rules! hash_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
        )]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub [u8; 32]);

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = NotAName;

            fn try_from(text: String) -> Result<Self, NotAName> {
                text.parse()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, formatter)
            }
        }

        impl FromStr for $name {
            type Err = NotAName;

            fn from_str(text: &str) -> Result<Self, NotAName> {
                match blake3::Hash::from_hex(text) {
                    // Upper case would be a second spelling of the same name.
                    Ok(hash) if hash.to_hex().as_str() == text => Ok(Self(*hash.as_bytes())),
                    _ => Err(NotAName(text.to_owned())),
                }
            }
        }
    };
}

hash_name! {
    /// Names a content: its BLAKE3 hash.
    ObjectName
}
hash_name! {
    /// Names a packed layer: the sum of its index's header, which covers everything in it.
    LayerName
}
hash_name! {
    /// Names the merged view of a chain of layers.
    ViewKey
}

/// A text is not the name of an object, layer or view.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not 64 hexadecimal digits in lower case")]
pub struct NotAName(String);

impl ObjectName {
    /// The name of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }
}

impl ViewKey {
    /// The key of the chain of `layers`, the lowest first.
    pub fn of(layers: &[LayerName]) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(b"plywood view 1\0");
        for layer in layers {
            hash.update(&layer.0);
        }
        Self(*hash.finalize().as_bytes())
    }
}

/// The first 8 bytes of the BLAKE3 hash.
pub(super) fn short_sum(bytes: &[u8]) -> [u8; 8] {
    let mut sum = [0; 8];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    sum
}

/// Little-endian numbers at fixed places of a record, whose length was checked when it was got.
#[derive(Clone, Copy)]
pub(super) struct Record<'a>(pub(super) &'a [u8]);

impl<'a> Record<'a> {
    /// `N` bytes; zeros where the record has no more, which no place of a checked record is.
    pub(super) fn array<const N: usize>(self, at: usize) -> [u8; N] {
        match self.0.get(at..).and_then(<[u8]>::first_chunk) {
            Some(bytes) => *bytes,
            None => [0; N],
        }
    }

    pub(super) fn u8(self, at: usize) -> u8 {
        u8::from_le_bytes(self.array(at))
    }

    pub(super) fn u16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn u32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(super) fn u64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    pub(super) fn i64(self, at: usize) -> i64 {
        i64::from_le_bytes(self.array(at))
    }

    /// Whether these bytes are zero.
    pub(super) fn is_zero(self, from: usize, to: usize) -> bool {
        self.0
            .get(from..to)
            .is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0))
    }
}

/// What is wrong with a file that has something in bytes that no version or feature that is known uses.
pub(super) const NOT_ZERO: &str = "it has something where zeros have to be";

/// Refuses a file of a later version than 1, or with an incompatible feature. No feature is known yet.
pub(super) fn check_features(path: &Path, version: u16, incompatible: u64) -> Result<()> {
    check_version(path, 1, version, incompatible)
}

/// The same, of a kind of file whose version is `known`.
pub(super) fn check_version(
    path: &Path,
    known: u16,
    version: u16,
    incompatible: u64,
) -> Result<()> {
    let problem = if version != known {
        format!("its format has the version {version}, and this one knows version {known}")
    } else if incompatible != 0 {
        format!("it uses the features {incompatible:#x}, which this one does not know")
    } else {
        return Ok(());
    };
    Err(Error::Unsupported {
        path: path.to_owned(),
        problem,
    })
}

#[cfg(test)]
mod documented;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_spelling() {
        let name = ObjectName::of(b"plywood");
        assert_eq!(name.to_string().parse::<ObjectName>().unwrap(), name);
        for text in ["", "ab", &name.to_string().to_uppercase(), "zz"] {
            assert!(text.parse::<ObjectName>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_key_of_a_view_depends_on_the_order() {
        let (a, b) = (LayerName([1; 32]), LayerName([2; 32]));
        assert_ne!(ViewKey::of(&[a, b]), ViewKey::of(&[b, a]));
        assert_ne!(ViewKey::of(&[]), ViewKey::of(&[a]));
    }

    #[test]
    fn numbers_past_the_end_are_zero() {
        let record = Record(&[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(record.u32(0), 0x0403_0201);
        assert_eq!(record.u64(0), 0);
        assert_eq!(record.u16(usize::MAX), 0);
        assert!(!record.is_zero(6, 8));
    }
}
