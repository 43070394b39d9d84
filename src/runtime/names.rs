//! Names for containers that were given none.

use rand::Rng;
use rand::seq::IndexedRandom;

const QUALITIES: [&str; 32] = [
    "amber", "bold", "brisk", "calm", "clear", "crisp", "deep", "eager", "early", "fair", "fine",
    "firm", "gentle", "glad", "golden", "green", "keen", "kind", "level", "light", "lucid",
    "mellow", "neat", "plain", "proud", "quick", "quiet", "sharp", "solid", "still", "warm",
    "wide",
];

const WOODS: [&str; 32] = [
    "acacia", "alder", "apple", "ash", "aspen", "balsa", "beech", "birch", "box", "cedar",
    "cherry", "chestnut", "cypress", "ebony", "elm", "fir", "hazel", "hickory", "holly", "juniper",
    "larch", "linden", "maple", "oak", "olive", "pear", "pine", "poplar", "rowan", "spruce",
    "walnut", "yew",
];

/// A name, for example `quiet_maple`; with a number where many are taken.
pub fn generate(is_taken: impl Fn(&str) -> bool) -> String {
    let mut random = rand::rng();
    let mut numbers = 0;
    loop {
        let quality = QUALITIES.choose(&mut random).copied().unwrap_or("plain");
        let wood = WOODS.choose(&mut random).copied().unwrap_or("oak");
        let name = match numbers {
            0 => format!("{quality}_{wood}"),
            most => format!("{quality}_{wood}{}", random.random_range(1..=most)),
        };
        if !is_taken(&name) {
            return name;
        }
        numbers = (numbers * 2).max(9);
    }
}

/// Why `name` cannot be a container's name, if so.
pub fn problem(name: &str) -> Option<&'static str> {
    let mut bytes = name.bytes();
    let first = bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if !first || !rest {
        Some("a name is made of letters, digits, '_', '.' and '-', the first a letter or a digit")
    } else if name.len() > 128 {
        Some("a name has at most 128 characters")
    } else if name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Some("it could be the id of another container")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn generated_names_are_names_and_never_run_out() {
        let mut taken = BTreeSet::new();
        for _ in 0..3000 {
            let name = generate(|name| taken.contains(name));
            assert_eq!(problem(&name), None);
            assert!(taken.insert(name));
        }
    }

    #[test]
    fn bad_names_are_refused() {
        for name in [
            "",
            "-x",
            "a b",
            "a/b",
            "\u{e4}",
            &"x".repeat(129),
            &"a".repeat(64),
        ] {
            assert!(problem(name).is_some(), "{name}");
        }
    }
}
