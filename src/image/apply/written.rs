//! What a layer has written so far: an opaque marker spares it, wherever in the stream it comes.

use std::collections::HashSet;

/// Sixteen bytes of a path's hash: a layer may have millions of paths.
type Key = [u8; 16];

/// The set of paths that this layer wrote, and of the directories on the way to them.
#[derive(Default)]
pub(super) struct Written {
    keys: HashSet<Key>,
}

impl Written {
    /// Notes that the layer wrote `path`.
    pub(super) fn insert(&mut self, path: &[u8]) {
        self.keys.insert(key(path));
        let mut rest = path;
        while let Some(slash) = rest.iter().rposition(|&byte| byte == b'/') {
            rest = &rest[..slash];
            // Whoever noted this one has noted those above.
            if !self.keys.insert(key(rest)) {
                break;
            }
        }
    }

    /// Whether the layer wrote `path` or anything below it.
    pub(super) fn contains(&self, path: &[u8]) -> bool {
        self.keys.contains(&key(path))
    }
}

fn key(path: &[u8]) -> Key {
    let mut key = Key::default();
    key.copy_from_slice(&blake3::hash(path).as_bytes()[..16]);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_spares_the_directories_above_it_only() {
        let mut written = Written::default();
        written.insert(b"a/b/c");
        for path in ["a", "a/b", "a/b/c"] {
            assert!(written.contains(path.as_bytes()), "{path}");
        }
        for path in ["a/b/c/d", "a/bc", "b", ""] {
            assert!(!written.contains(path.as_bytes()), "{path}");
        }
    }
}
