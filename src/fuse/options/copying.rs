//! The options that say how large files are copied up.

use std::ffi::OsStr;
use std::time::Duration;

use super::table::bad_value;
use super::{OptionError, Options};
use crate::cow::Chunking;

/// How often files are completed that have largely been copied up.
pub(super) const DEFAULT_COMPLETE: Duration = Duration::from_secs(30);

/// `4096`, `64K`, `1M`, `2G`.
fn bytes(value: &OsStr) -> Option<u64> {
    let text = value.to_str()?;
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// `chunk_size=BYTES`, or `off`.
pub(super) fn set_chunk_size(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    if value == "off" {
        options.chunking = Chunking::OFF;
        return Ok(());
    }
    let possible = |size: &u64| size.is_power_of_two() && (4096..=1 << 30).contains(size);
    let size = bytes(value).filter(possible).ok_or_else(|| {
        bad_value(
            "chunk_size",
            value,
            "say a power of two from 4K to 1G, or `off`",
        )
    })?;
    if options.chunking == Chunking::OFF {
        options.chunking = Chunking::default();
    }
    options.chunking.size = size;
    Ok(())
}

/// `copy_whole=BYTES`.
pub(super) fn set_copy_whole(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    options.chunking.whole_up_to = bytes(value)
        .ok_or_else(|| bad_value("copy_whole", value, "say a number of bytes, as in 1M"))?;
    Ok(())
}

/// `complete=SECONDS`, or `off`.
pub(super) fn set_complete(options: &mut Options, value: &OsStr) -> Result<(), OptionError> {
    let seconds = || value.to_str()?.parse().ok().filter(|seconds| *seconds > 0);
    options.complete = match seconds() {
        Some(seconds) => Some(Duration::from_secs(seconds)),
        None if value == "off" => None,
        None => {
            return Err(bad_value(
                "complete",
                value,
                "say a number of seconds, or `off`",
            ));
        }
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Mounter, parse};

    #[test]
    fn sizes_have_suffixes_and_limits() {
        let chunking = |text: &str| {
            let text = format!("lowerdir=/a,{text}");
            parse(&[text], Mounter::Root).map(|options| options.chunking)
        };
        let set = chunking("chunk_size=8K,copy_whole=2M").unwrap();
        assert_eq!((set.size, set.whole_up_to), (8 << 10, 2 << 20));
        assert_eq!(chunking("chunk_size=off").unwrap().whole_up_to, u64::MAX);
        assert_eq!(
            chunking("chunk_size=off,chunk_size=64K").unwrap(),
            chunking("").unwrap()
        );
        for text in [
            "chunk_size=1K",
            "chunk_size=5000",
            "chunk_size=2G",
            "copy_whole=x",
            "copy_whole=-1",
        ] {
            assert!(chunking(text).is_err(), "{text}");
        }
    }

    #[test]
    fn completion_is_a_time_or_off() {
        let complete = |text: &str| {
            let text = format!("lowerdir=/a,complete={text}");
            parse(&[text], Mounter::Root).map(|options| options.complete)
        };
        assert_eq!(complete("5").unwrap().unwrap().as_secs(), 5);
        assert_eq!(complete("off"), Ok(None));
        for text in ["0", "-1", "soon"] {
            assert!(complete(text).is_err(), "{text}");
        }
    }
}
