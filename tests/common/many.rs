//! Layers of small files.

use super::archive::{Layer, noise};

/// A directory of so many files, each of `noise` and longer than the one before it.
pub fn many(dir: &str, count: u64, seed: u64) -> Layer {
    (0..count).fold(Layer::new().dir(dir, 0o755), |layer, number| {
        let content = noise(seed << 32 | number, 200 + 37 * number as usize);
        layer.file(&format!("{dir}/{number}"), 0o644, &content)
    })
}
