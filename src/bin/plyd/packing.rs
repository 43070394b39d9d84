//! What plyd is told of how layers are packed and read.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use plywood::store::ingest::{Limits, Settings as Packing};
use plywood::store::layer::index::{LARGEST_XATTR, LONGEST_PATH};
use plywood::store::view::Verify;
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::settings::{LargeObjects, Settings};

/// Bytes of the largest content that a pack has room for.
const LARGEST_PACKED: u64 = 16 << 20;
const LEAST_MEMORY: u64 = 8 << 20;
const MOST_WORKERS: u64 = 256;
/// Records that a section of an index has room for, and bytes of its names.
const MOST_ENTRIES: u64 = u32::MAX as u64 - 1;
const MOST_NAMES: u64 = u32::MAX as u64;

/// When contents of packed layers are compared with their names.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WhenVerified {
    /// Not at all
    Never,
    /// When a mount first reads them
    #[default]
    First,
    /// Whenever a file is opened
    Always,
}

impl From<WhenVerified> for Verify {
    fn from(when: WhenVerified) -> Self {
        match when {
            WhenVerified::Never => Self::Never,
            WhenVerified::First => Self::First,
            WhenVerified::Always => Self::Always,
        }
    }
}

/// A number of bytes: `4096`, or with a unit, `128K`, `256MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || {
            format!(
                "{text:?} is no number of bytes; write 268435456, or 256M with K, M, G or T for powers of 1024"
            )
        };
        let end = text.find(|c: char| !c.is_ascii_digit());
        let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
        let shift = match unit.strip_suffix("iB").unwrap_or(unit) {
            "" if unit.is_empty() => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, as 268435456 or \"256M\"")
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                let bytes = u64::try_from(bytes);
                bytes
                    .map(Size)
                    .map_err(|_| E::custom("a number of bytes is not negative"))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Bytes)
    }
}

/// What the settings say of packing, if nothing is wrong with it.
pub fn packing(settings: &Settings) -> Result<Packing, String> {
    let default = Packing::default();
    let bytes = |size: Option<Size>, default| size.map_or(default, |size| size.0);
    let small = bytes(settings.small_object_limit, default.small);
    let memory = bytes(settings.import_memory, default.memory);
    let level = settings.zstd_level.unwrap_or(default.level.into());
    let workers = settings.import_workers.unwrap_or(default.workers as u64);
    let limits = Limits {
        bytes: bytes(settings.layer_max_bytes, default.limits.bytes),
        entries: settings.layer_max_entries.unwrap_or(default.limits.entries),
        names: bytes(settings.layer_max_names, default.limits.names),
        file: bytes(settings.layer_max_file, default.limits.file),
        path: bytes(settings.layer_max_path, default.limits.path),
        xattr: bytes(settings.layer_max_xattr, default.limits.xattr),
    };
    within("small_object_limit", small, 1, LARGEST_PACKED)?;
    within("import_memory", memory, LEAST_MEMORY, u64::MAX)?;
    within("import_workers", workers, 1, MOST_WORKERS)?;
    within("layer_max_bytes", limits.bytes, 1, i64::MAX as u64)?;
    within("layer_max_entries", limits.entries, 1, MOST_ENTRIES)?;
    within("layer_max_names", limits.names, 1, MOST_NAMES)?;
    within("layer_max_file", limits.file, 1, i64::MAX as u64)?;
    within("layer_max_path", limits.path, 1, LONGEST_PATH as u64)?;
    within("layer_max_xattr", limits.xattr, 1, LARGEST_XATTR as u64)?;
    if !(1..=22).contains(&level) {
        return Err(format!(
            "zstd_level is {level}; it has to be a level of zstd, from 1 (fast) to 22 (small)"
        ));
    }
    let packing = Packing {
        small,
        plain: settings.large_objects == Some(LargeObjects::Plain),
        // Both are in range.
        level: level as i32,
        workers: workers as usize,
        memory,
        limits,
    };
    let least = packing
        .least_memory()
        .map_err(|error| format!("zstd cannot compress with the level {level}: {error}"))?;
    if memory < least {
        return Err(format!(
            "import_memory is {memory}, and with a small_object_limit of {small}, a zstd_level of {level} and {workers} import_workers an import needs {least} bytes; raise the one or lower the others"
        ));
    }
    Ok(packing)
}

fn within(key: &str, value: u64, least: u64, most: u64) -> Result<(), String> {
    if value < least {
        return Err(format!("{key} is {value}; it has to be at least {least}"));
    }
    if value > most {
        return Err(format!("{key} is {value}; it has to be {most} at most"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("128K", Some(128 << 10)),
            ("256MiB", Some(256 << 20)),
            ("1G", Some(1 << 30)),
            ("2TiB", Some(2 << 40)),
            ("", None),
            ("M", None),
            ("iB", None),
            ("1iB", None),
            ("1 M", None),
            ("-1", None),
            ("1kB", None),
            ("99999999999G", None),
        ] {
            assert_eq!(text.parse::<Size>().ok(), bytes.map(Size), "{text}");
        }
    }

    #[test]
    fn defaults_are_sound_and_nonsense_is_refused_by_its_key() {
        let read = |text: &str| packing(&toml::from_str(text).unwrap());
        assert_eq!(read("").unwrap(), Packing::default());
        let chosen = read(
            "small_object_limit = \"64K\"\nimport_memory = 67108864\nzstd_level = 3\nimport_workers = 2\nlarge_objects = \"plain\"\nlayer_max_entries = 7\nlayer_max_file = \"1G\"\nlayer_max_path = 255\nlayer_max_xattr = \"4K\"",
        );
        let chosen = chosen.unwrap();
        assert_eq!((chosen.small, chosen.memory), (64 << 10, 64 << 20));
        assert_eq!((chosen.level, chosen.workers), (3, 2));
        assert!(chosen.plain);
        assert_eq!(chosen.limits.entries, 7);
        let Limits {
            file, path, xattr, ..
        } = chosen.limits;
        assert_eq!((file, path, xattr), (1 << 30, 255, 4096));
        for text in [
            "small_object_limit = 0",
            "small_object_limit = \"17M\"",
            "import_memory = \"1M\"",
            "import_workers = 0",
            "import_workers = 300",
            "zstd_level = 0",
            "zstd_level = 40",
            "layer_max_bytes = 0",
            "layer_max_entries = 0",
            "layer_max_entries = 5000000000",
            "layer_max_names = \"8G\"",
            "layer_max_file = 0",
            "layer_max_file = \"8388608T\"",
            "layer_max_path = 4096",
            "layer_max_xattr = \"65K\"",
        ] {
            let key = text.split(' ').next().unwrap();
            let problem = read(text).unwrap_err();
            assert!(problem.starts_with(&format!("{key} is ")), "{problem}");
        }
        for text in [
            "small_object_limit = \"16M\"\nimport_memory = \"32M\"",
            // It took 646 MB.
            "small_object_limit = \"16M\"\nzstd_level = 22\nimport_workers = 2",
        ] {
            let problem = read(text).unwrap_err();
            assert!(problem.contains("raise the one"), "{problem}");
        }
        read("zstd_level = 22\nimport_workers = 2").unwrap();
        // The default is to do on a host of many processors.
        read("import_workers = 64").unwrap();
        for text in [
            "import_memory = \"x\"",
            "import_memory = -1",
            "verify = \"often\"",
            "large_objects = \"packed\"",
        ] {
            assert!(toml::from_str::<Settings>(text).is_err(), "{text}");
        }
    }
}
