//! PAX headers.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};

use super::super::format::Time;
use super::super::format::tables::Xattrs;
use super::Part;

/// libarchive leaves the padding out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Where the map of a sparse file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sparse {
    /// In records: versions 0.0 and 0.1.
    InHeader,
    /// Before the content: version 1.0.
    InData,
}

/// The records of a header. Of several with one name the last counts.
#[derive(Debug, Default)]
pub(super) struct Records {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Values of version 0.0's records for the map, which has several with one name.
    pairs: Vec<Vec<u8>>,
}

/// Records of the form `LENGTH KEY=VALUE\n`, the length counting all of it. Values are bytes.
pub(super) fn parse(mut data: &[u8]) -> Option<Records> {
    let mut records = Records::default();
    while !data.is_empty() {
        let space = data.iter().take(20).position(|&byte| byte == b' ')?;
        let length = usize::try_from(decimal(&data[..space])?).ok()?;
        let record = data.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&byte| byte == b'=')?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"" => return None,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                // They come in turns, the offset first.
                let second = key == b"GNU.sparse.numbytes";
                if (records.pairs.len() % 2 == 1) != second {
                    return None;
                }
                records.pairs.push(value.to_vec());
            }
            _ => {
                records.records.insert(key.to_vec(), value.to_vec());
            }
        }
        data = &data[length..];
    }
    Some(records)
}

impl Records {
    /// The value of a record that is not empty.
    pub(super) fn text(&self, key: &str) -> Option<&[u8]> {
        let value = self.records.get(key.as_bytes())?;
        (!value.is_empty()).then_some(value)
    }

    /// Extended attributes. star's form goes before libarchive's, for streams with both have the same in both.
    pub(super) fn xattrs(&self) -> Option<Xattrs> {
        let mut xattrs = BTreeMap::new();
        for (key, value) in &self.records {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                xattrs.insert(name.to_vec(), value.clone());
            } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                // "L" comes before "S", so the other form replaces this one.
                xattrs.insert(unescape(name)?, BASE64.decode(value).ok()?);
            }
        }
        Some(xattrs.into_iter().collect())
    }

    /// Whether the file is sparse, and how; `None` if that cannot be told.
    pub(super) fn sparse_version(&self) -> Option<Option<Sparse>> {
        let version = (self.text("GNU.sparse.major"), self.text("GNU.sparse.minor"));
        match version {
            (Some(b"0"), Some(b"0" | b"1")) => Some(Some(Sparse::InHeader)),
            (Some(b"1"), Some(b"0")) => Some(Some(Sparse::InData)),
            (None, None) if self.text("GNU.sparse.map").is_some() || !self.pairs.is_empty() => {
                Some(Some(Sparse::InHeader))
            }
            // A file that is one hole.
            (None, None) if self.text("GNU.sparse.numblocks") == Some(b"0") => {
                Some(Some(Sparse::InHeader))
            }
            (None, None) => Some(None),
            _ => None,
        }
    }

    /// Bytes of the sparse file, which are those of the content unless a record says otherwise.
    pub(super) fn sparse_size(&self, stored: u64) -> Option<u64> {
        let value = self.text("GNU.sparse.size");
        match value.or_else(|| self.text("GNU.sparse.realsize")) {
            Some(value) => u64::try_from(decimal(value)?).ok(),
            None => Some(stored),
        }
    }

    /// The map of versions 0.0 and 0.1.
    pub(super) fn sparse_map(&self) -> Option<Vec<Part>> {
        let numbers: Vec<&[u8]> = match self.text("GNU.sparse.map") {
            Some(map) => map.split(|&byte| byte == b',').collect(),
            None => self.pairs.iter().map(Vec::as_slice).collect(),
        };
        let pairs = numbers.chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return None;
        }
        let number = |text: &[u8]| u64::try_from(decimal(text)?).ok();
        pairs
            .map(|pair| {
                Some(Part {
                    offset: number(pair[0])?,
                    length: number(pair[1])?,
                })
            })
            .collect()
    }
}

/// A decimal number.
pub(super) fn decimal(value: &[u8]) -> Option<i64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Decimal seconds with a fraction, cut to nanoseconds; may be negative.
pub(super) fn time(value: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let sec: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nsec = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0u32, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    if whole.starts_with('-') && nsec != 0 {
        return Some(Time {
            sec: sec.checked_sub(1)?,
            nsec: 1_000_000_000 - nsec,
        });
    }
    Some(Time { sec, nsec })
}

/// A name with `%` and two hexadecimal digits for unusual bytes.
fn unescape(name: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_count_forward() {
        let at = |sec, nsec| Some(Time { sec, nsec });
        assert_eq!(time(b"12.5"), at(12, 500_000_000));
        assert_eq!(time(b"-1.25"), at(-2, 750_000_000));
        assert_eq!(time(b"3"), at(3, 0));
        assert_eq!(time(b"1.1234567899"), at(1, 123_456_789));
        for bad in [&b""[..], b".5", b"1.x", b"x", b"1.-5"] {
            assert_eq!(time(bad), None);
        }
    }

    #[test]
    fn damaged_records_are_refused() {
        assert!(parse(b"9 a=bcde\n").is_some());
        for bad in [
            &b"8 a=bcde\n"[..],
            b"11 a=bcde\n",
            b"x a=b\n",
            b"5 =b\n\n",
            b"-1 a=b\n",
            b"0 a=b\n",
            b"6 abc\n",
            b"99999999999999999999 a=b\n",
            b"24 GNU.sparse.numbytes=1\n",
        ] {
            assert!(parse(bad).is_none(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn both_forms_of_attributes_are_read() {
        let text = b"32 LIBARCHIVE.xattr.user.%61=YQ\n22 SCHILY.xattr.u.b=c\n";
        let xattrs = parse(text).unwrap().xattrs().unwrap();
        assert_eq!(
            xattrs,
            [
                (b"u.b".to_vec(), b"c".to_vec()),
                (b"user.a".to_vec(), b"a".to_vec())
            ]
        );
        let bad = b"31 LIBARCHIVE.xattr.user.a=Y*Q\n";
        assert!(parse(bad).unwrap().xattrs().is_none());
    }
}
