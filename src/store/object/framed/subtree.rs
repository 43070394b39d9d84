//! Frames as subtrees of the tree that BLAKE3 hashes an object as, so that each can be compared with the object's name
//! by itself.

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::store::format::ObjectName;

/// What stands for the content of a frame in the name of its object.
pub(super) type Value = ChainingValue;

/// Which part of its object a frame is. Its length has to be a power of two of at least a chunk (1 KiB), and its start a
/// multiple of that; only the last one of an object may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct Subtree {
    start: u64,
    is_root: bool,
}

impl Subtree {
    /// The frame that starts at `start` in an object of `size` bytes, with frames of `frame` bytes.
    pub(in crate::store) fn new(start: u64, frame: u64, size: u64) -> Self {
        Self {
            start,
            is_root: size <= frame,
        }
    }

    /// The value of the frame with this content, which is not empty.
    pub(super) fn value(self, content: &[u8]) -> Value {
        if self.is_root {
            return *blake3::hash(content).as_bytes();
        }
        Hasher::new()
            .set_input_offset(self.start)
            .update(content)
            .finalize_non_root()
    }
}

/// The name of the object whose frames have these values; there is at least one.
pub(super) fn name_of(values: &[Value]) -> ObjectName {
    match values {
        [] => ObjectName::of(&[]),
        [only] => ObjectName(*only),
        _ => {
            let (left, right) = values.split_at(left_of(values.len()));
            let name = merge_subtrees_root(&merged(left), &merged(right), Mode::Hash);
            ObjectName(*name.as_bytes())
        }
    }
}

/// As deep as the logarithm of the number of frames, of which a file has less than 2^32.
fn merged(values: &[Value]) -> Value {
    match values {
        [only] => *only,
        _ => {
            let (left, right) = values.split_at(left_of(values.len()));
            merge_subtrees_non_root(&merged(left), &merged(right), Mode::Hash)
        }
    }
}

/// How many of two or more subtrees are to the left: the largest power of two that leaves one.
fn left_of(count: usize) -> usize {
    (count / 2 + count % 2).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_of_frames_make_the_name() {
        for frame in [1 << 10, 4 << 10, 128 << 10] {
            for (frames, more) in
                (0..20).flat_map(|frames| [(frames, 0), (frames, 1), (frames, 1025)])
            {
                let size = frames * frame + more % frame;
                if size == 0 {
                    continue;
                }
                let mut content = vec![0; size];
                Hasher::new().finalize_xof().fill(&mut content);
                let values: Vec<_> = content
                    .chunks(frame)
                    .enumerate()
                    .map(|(number, part)| {
                        let start = (number * frame) as u64;
                        Subtree::new(start, frame as u64, size as u64).value(part)
                    })
                    .collect();
                let name = name_of(&values);
                assert_eq!(name, ObjectName::of(&content), "{size} bytes by {frame}");
            }
        }
    }

    #[test]
    fn a_value_is_that_of_one_place() {
        let content = [7; 4096];
        let value = |start| Subtree::new(start, 4096, 1 << 20).value(&content);
        assert_ne!(value(0), value(4096));
        assert_ne!(value(0), Subtree::new(0, 4096, 4096).value(&content));
    }
}
