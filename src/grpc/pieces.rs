//! A stream on its way to somebody, in messages.

use std::io::{self, Write};

/// Hands over what is written, in pieces of one size; a flush hands over what there is.
pub(super) struct Pieces<S> {
    send: S,
    size: usize,
    piece: Vec<u8>,
}

impl<S: FnMut(Vec<u8>) -> io::Result<()>> Pieces<S> {
    /// Pieces of `size` bytes.
    pub(super) fn new(size: usize, send: S) -> Self {
        let piece = Vec::with_capacity(size);
        Self { send, size, piece }
    }
}

impl<S: FnMut(Vec<u8>) -> io::Result<()>> Write for Pieces<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.size - self.piece.len());
        self.piece.extend_from_slice(&bytes[..count]);
        if self.piece.len() == self.size {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let next = Vec::with_capacity(self.size);
        (self.send)(std::mem::replace(&mut self.piece, next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_comes_in_full_pieces_but_the_last() {
        let mut got = Vec::new();
        let mut pieces = Pieces::new(4, |piece| {
            got.push(piece);
            Ok(())
        });
        for bytes in [&b"ab"[..], b"", b"cdefghijk"] {
            pieces.write_all(bytes).unwrap();
        }
        pieces.flush().unwrap();
        pieces.flush().unwrap();
        assert_eq!(got, [&b"abcd"[..], b"efgh", b"ijk"]);
    }
}
