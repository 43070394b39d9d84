//! Making such a file.

use std::io::{self, Write};

use super::{HEADER, Identity, Kind, PAGE, SECTIONS_AT, SUM_AT, Section};

/// The sections of an index that is being made.
#[derive(Debug, Default)]
pub(in crate::store) struct IndexWriter {
    sections: Vec<(Section, Vec<u8>)>,
}

impl IndexWriter {
    /// Adds a section; none is added twice.
    pub(in crate::store) fn section(&mut self, section: Section, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.sections.push((section, bytes));
        }
    }

    /// Writes it to `out` and answers the sum of its header.
    pub(in crate::store) fn write(
        self,
        out: &mut impl Write,
        kind: Kind,
        identity: &Identity,
    ) -> io::Result<[u8; 32]> {
        let mut header = [0; HEADER];
        let mut at = HEADER as u64;
        let mut slot = SECTIONS_AT;
        for (section, bytes) in &self.sections {
            let length = bytes.len() as u64;
            header[slot..slot + 4].copy_from_slice(&(*section as u32).to_le_bytes());
            header[slot + 4..slot + 8].copy_from_slice(&(section.record() as u32).to_le_bytes());
            header[slot + 8..slot + 16].copy_from_slice(&at.to_le_bytes());
            header[slot + 16..slot + 24].copy_from_slice(&length.to_le_bytes());
            slot += 32;
            at += length.next_multiple_of(8);
        }
        let sums = self.page_sums();
        header[..8].copy_from_slice(kind.magic());
        header[8..10].copy_from_slice(&1u16.to_le_bytes());
        header[10..12].copy_from_slice(&(self.sections.len() as u16).to_le_bytes());
        header[40..48].copy_from_slice(&(at + sums.len() as u64).to_le_bytes());
        header[48..56].copy_from_slice(&at.to_le_bytes());
        header[56..64].copy_from_slice(&identity.tar_bytes.to_le_bytes());
        header[64..96].copy_from_slice(blake3::hash(&sums).as_bytes());
        header[96..128].copy_from_slice(&identity.key);
        let sum = *blake3::hash(&header[..SUM_AT]).as_bytes();
        header[SUM_AT..].copy_from_slice(&sum);
        out.write_all(&header)?;
        for (_, bytes) in &self.sections {
            out.write_all(bytes)?;
            out.write_all(padding(bytes.len()))?;
        }
        out.write_all(&sums)?;
        Ok(sum)
    }

    fn page_sums(&self) -> Vec<u8> {
        let mut sums = Vec::new();
        let mut page = Vec::with_capacity(PAGE as usize);
        let pieces = self
            .sections
            .iter()
            .flat_map(|(_, bytes)| [bytes.as_slice(), padding(bytes.len())]);
        for mut piece in pieces {
            while !piece.is_empty() {
                let room = (PAGE as usize - page.len()).min(piece.len());
                page.extend_from_slice(&piece[..room]);
                piece = &piece[room..];
                if page.len() == PAGE as usize {
                    sums.extend_from_slice(blake3::hash(&page).as_bytes());
                    page.clear();
                }
            }
        }
        if !page.is_empty() {
            sums.extend_from_slice(blake3::hash(&page).as_bytes());
        }
        sums
    }
}

fn padding(length: usize) -> &'static [u8] {
    &[0; 8][..length.next_multiple_of(8) - length]
}
