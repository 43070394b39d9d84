//! The fields of a header block.

use super::Part;

/// Bytes of a block.
pub(super) const BLOCK: usize = 512;

/// A header block.
pub(super) struct Header<'a>(pub(super) &'a [u8; BLOCK]);

impl Header<'_> {
    /// Whether its checksum is right, in either of the two ways in which it was ever computed.
    pub(super) fn is_sound(&self) -> bool {
        let claimed = number(&self.0[148..156]);
        let bytes = || {
            self.0[..148]
                .iter()
                .chain(b"        ")
                .chain(&self.0[156..])
        };
        let unsigned: i64 = bytes().map(|&byte| i64::from(byte)).sum();
        let signed: i64 = bytes().map(|&byte| i64::from(byte.cast_signed())).sum();
        claimed == Some(unsigned) || claimed == Some(signed)
    }

    pub(super) fn flag(&self) -> u8 {
        self.0[156]
    }

    /// The name with its prefix.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = if self.0[257..263] != *b"ustar\0" {
            b""
        } else if self.0[508..] == *b"tar\0" {
            // star keeps times behind a shorter prefix.
            text(&self.0[345..476])
        } else {
            text(&self.0[345..500])
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Option<i64> {
        number(&self.0[100..108])
    }

    pub(super) fn uid(&self) -> Option<i64> {
        number(&self.0[108..116])
    }

    pub(super) fn gid(&self) -> Option<i64> {
        number(&self.0[116..124])
    }

    pub(super) fn size(&self) -> Option<u64> {
        number(&self.0[124..136]).and_then(|size| u64::try_from(size).ok())
    }

    pub(super) fn mtime(&self) -> Option<i64> {
        number(&self.0[136..148])
    }

    /// GNU's access time, which few streams have.
    pub(super) fn atime(&self) -> Option<i64> {
        if self.is_gnu() && self.0[345] != 0 {
            number(&self.0[345..357])
        } else {
            None
        }
    }

    /// Major and minor number.
    pub(super) fn device(&self) -> Option<(u32, u32)> {
        let field = |at: usize| u32::try_from(number(&self.0[at..at + 8])?).ok();
        Some((field(329)?, field(337)?))
    }

    /// Bytes of a sparse file in GNU's old form.
    pub(super) fn real_size(&self) -> Option<u64> {
        u64::try_from(number(&self.0[483..495])?).ok()
    }

    /// The parts in GNU's old form that the header has room for. Answers whether a block with
    /// more of them follows.
    pub(super) fn parts(&self, parts: &mut Vec<Part>) -> Option<bool> {
        if !self.is_gnu() {
            return None;
        }
        read_parts(&self.0[386..482], parts)?;
        Some(self.0[482] != 0)
    }

    fn is_gnu(&self) -> bool {
        self.0[257..265] == *b"ustar  \0"
    }
}

/// As [`Header::parts`], for a block that follows a header.
pub(super) fn more_parts(block: &[u8; BLOCK], parts: &mut Vec<Part>) -> Option<bool> {
    read_parts(&block[..504], parts)?;
    Some(block[504] != 0)
}

fn read_parts(table: &[u8], parts: &mut Vec<Part>) -> Option<()> {
    for entry in table.chunks_exact(24) {
        // An empty field ends the map.
        if entry[0] == 0 || entry[12] == 0 {
            break;
        }
        parts.push(Part {
            offset: u64::try_from(number(&entry[..12])?).ok()?,
            length: u64::try_from(number(&entry[12..])?).ok()?,
        });
    }
    Some(())
}

fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&byte| byte == 0);
    &field[..end.unwrap_or(field.len())]
}

/// A number of a header: octal text, or GNU's big-endian two's complement behind a set high bit.
fn number(field: &[u8]) -> Option<i64> {
    if field.first().is_some_and(|byte| byte & 0x80 != 0) {
        let negative = field[0] & 0x40 != 0;
        let first = if negative {
            i128::from(field[0]) - 0x100
        } else {
            i128::from(field[0] & 0x7f)
        };
        return field[1..]
            .iter()
            .try_fold(first, |sum, &byte| {
                sum.checked_mul(256)?.checked_add(i128::from(byte))
            })
            .and_then(|sum| i64::try_from(sum).ok());
    }
    let blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field
        .iter()
        .position(|byte| !blank(byte))
        .unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0i64, |sum, byte| match byte {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   17 \0"), Some(0o17));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"12x4567\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 1, 0, 0, 0]), Some(1 << 24));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0x7f; 1]), None);
        let mut large = [0xff; 12];
        large[0] = 0x80;
        assert_eq!(number(&large), None);
    }
}
