//! What the name of an entry asks for: whiteouts, and names that lead nowhere good.

use super::super::layer::index::LONGEST_NAME;

/// Begins the name of a whiteout.
pub(crate) const WHITEOUT: &[u8] = b".wh.";
/// AUFS's own files; of these only the opaque marker has a meaning for others.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What an entry's name asks for.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::store) enum Meaning<'a> {
    /// Nothing: the root itself, or a file of AUFS's own.
    Nothing,
    /// The entry's object is to be made.
    Make(Vec<&'a [u8]>),
    /// A tree is to be removed.
    Remove(Vec<&'a [u8]>),
    /// All that the layers below have in a directory is to be removed.
    Clear(Vec<&'a [u8]>),
}

/// What an entry of that name asks for. The problem is what is wrong with the name.
pub(in crate::store) fn meaning(path: &[u8]) -> Result<Meaning<'_>, &'static str> {
    let mut parts = cleaned(path)?;
    let Some((name, above)) = parts.split_last() else {
        // containerd leaves the root as it is, and so must whoever wants the same tree.
        return Ok(Meaning::Nothing);
    };
    match above.iter().find(|part| part.starts_with(WHITEOUT)) {
        Some(part) if part.starts_with(WHITEOUT_META) => return Ok(Meaning::Nothing),
        Some(_) => return Err("it lies below a whiteout"),
        None => {}
    }
    if *name == OPAQUE {
        parts.pop();
        return checked(parts).map(Meaning::Clear);
    }
    if name.starts_with(WHITEOUT_META) {
        return Ok(Meaning::Nothing);
    }
    match name.strip_prefix(WHITEOUT) {
        None => checked(parts).map(Meaning::Make),
        Some(b"" | b"." | b"..") => Err("it is a whiteout of no name"),
        Some(name) => {
            parts.pop();
            parts.push(name);
            checked(parts).map(Meaning::Remove)
        }
    }
}

/// The names in a path, `..` taken back as far as there is something to take back.
pub(in crate::store) fn clean(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    cleaned(path).and_then(checked)
}

fn cleaned(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop().ok_or("it leads out of the layer by \"..\"")?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts)
}

/// Names of what is really there; a stream's own may be longer, for a whiteout's has four bytes before that.
fn checked(parts: Vec<&[u8]>) -> Result<Vec<&[u8]>, &'static str> {
    match parts.iter().any(|part| part.len() > LONGEST_NAME) {
        true => Err("it has a part of more than 255 bytes"),
        false => Ok(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_to_do() {
        assert_eq!(meaning(b"./a//b/"), Ok(Meaning::Make(vec![b"a", b"b"])));
        assert_eq!(meaning(b"/etc"), Ok(Meaning::Make(vec![b"etc"])));
        assert_eq!(meaning(b"a/../b"), Ok(Meaning::Make(vec![b"b"])));
        let other = Meaning::Make(vec![b"a", b".whiteout"]);
        assert_eq!(meaning(b"a/.whiteout"), Ok(other));
        for root in [&b""[..], b".", b"./", b"/", b"a/.."] {
            assert_eq!(meaning(root), Ok(Meaning::Nothing));
        }
        assert_eq!(meaning(b"a/.wh.b"), Ok(Meaning::Remove(vec![b"a", b"b"])));
        assert_eq!(meaning(b".wh..wh..opq"), Ok(Meaning::Clear(vec![])));
        assert_eq!(meaning(b"a/.wh..wh..opq"), Ok(Meaning::Clear(vec![b"a"])));
        for aufs in [&b".wh..wh.plnk"[..], b".wh..wh.plnk/1.2", b"a/.wh..wh.aufs"] {
            assert_eq!(meaning(aufs), Ok(Meaning::Nothing));
        }
    }

    /// What cannot be a name can still be that of its whiteout, or lead nowhere.
    #[test]
    fn only_names_that_are_left_have_to_fit() {
        for length in [252, 255] {
            let name = vec![b'n'; length];
            let whiteout = [&b"a/.wh."[..], &name].concat();
            assert_eq!(meaning(&whiteout), Ok(Meaning::Remove(vec![b"a", &name])));
        }
        let over = vec![b'n'; 256];
        assert!(meaning(&[&b".wh."[..], &over].concat()).is_err());
        let back = [&over[..], b"/../a"].concat();
        assert_eq!(meaning(&back), Ok(Meaning::Make(vec![b"a"])));
        assert!(meaning(&[&over[..], b"/.wh.a"].concat()).is_err());
        assert!(meaning(&[&over[..], b"/.wh..wh..opq"].concat()).is_err());
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = [b'x'; 256];
        for name in [
            &b"../a"[..],
            b"a/../../b",
            b"/..",
            b".wh.",
            b".wh..",
            b".wh...",
            b"a/.wh..",
            b".wh.a/b",
            &long,
        ] {
            assert!(meaning(name).is_err(), "{}", name.escape_ascii());
        }
    }
}
