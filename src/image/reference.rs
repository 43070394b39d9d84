//! Names of images: what users type, and the complete form that is kept.
//!
//! The grammar and the defaults are those of distribution's reference: `busybox` means
//! `docker.io/library/busybox:latest`.

use super::{Error, Result};

const DEFAULT_DOMAIN: &str = "docker.io";
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Where podman and buildah keep names without a registry.
const LOCAL_DOMAIN: &str = "localhost";
const LONGEST_REPOSITORY: usize = 255;
const LONGEST_TAG: usize = 128;
/// Fewer hex digits than this are never taken for the beginning of an id.
pub const SHORTEST_PREFIX: usize = 4;

/// What a user's reference may mean, in the order in which it is to be tried.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// Complete names.
    pub names: Vec<String>,
    /// Hex digits of the id or of the manifest's digest, all of them.
    pub digest: Option<String>,
    /// The first hex digits of an id.
    pub id_prefix: Option<String>,
    /// It would be such digits if there were more of them.
    pub too_short: bool,
}

/// The complete form of a name: domain, path and tag.
pub fn complete(name: &str) -> Result<String> {
    let bad = |problem| Error::BadName {
        name: name.to_owned(),
        problem,
    };
    if name.contains('@') {
        return Err(bad(
            "a name to give has no digest; leave out '@' and what follows",
        ));
    }
    let (domain, rest) = split_domain(name);
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) => (path, tag),
        None => (rest, DEFAULT_TAG),
    };
    if !is_domain(domain) {
        return Err(bad(
            "its registry must be a host name with an optional port",
        ));
    }
    if !path.split('/').all(is_path_component) {
        return Err(bad(
            "its path must be of lower-case letters and digits, separated by '/', '.', '_', '__' or '-'",
        ));
    }
    if !is_tag(tag) {
        return Err(bad(
            "its tag must be of 1 to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'",
        ));
    }
    let namespace = if domain == DEFAULT_DOMAIN && !path.contains('/') {
        DEFAULT_NAMESPACE
    } else {
        ""
    };
    if domain.len() + namespace.len() + path.len() >= LONGEST_REPOSITORY {
        return Err(bad("it has more than 255 characters before the tag"));
    }
    Ok(format!("{domain}/{namespace}{path}:{tag}"))
}

/// What `reference` may mean.
pub fn candidates(reference: &str) -> Result<Candidates> {
    let mut found = Candidates::default();
    if let Some((_, digest)) = reference.rsplit_once('@') {
        // The digest decides; a name before it is a comment.
        found.digest = Some(hex_of(reference, digest)?.to_owned());
        return Ok(found);
    }
    if reference.starts_with("sha256:") {
        found.digest = Some(hex_of(reference, reference)?.to_owned());
        return Ok(found);
    }
    let hex = is_lower_hex(reference);
    match complete(reference) {
        Ok(name) => found.names.push(name),
        // Sixty-four digits are a name's path too, so this is a reference that has no other meaning.
        Err(error) if !hex => return Err(error),
        Err(_) => {}
    }
    if split_domain(reference).0 == DEFAULT_DOMAIN && !reference.starts_with(DEFAULT_DOMAIN) {
        found
            .names
            .extend(complete(&format!("{LOCAL_DOMAIN}/{reference}")).ok());
    }
    if hex && reference.len() == 64 {
        found.digest = Some(reference.to_owned());
    } else if hex && (SHORTEST_PREFIX..64).contains(&reference.len()) {
        found.id_prefix = Some(reference.to_owned());
    }
    found.too_short = hex && reference.len() < SHORTEST_PREFIX;
    Ok(found)
}

fn hex_of<'a>(reference: &str, digest: &'a str) -> Result<&'a str> {
    digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && is_lower_hex(hex))
        .ok_or_else(|| Error::BadName {
            name: reference.to_owned(),
            problem: "a digest is \"sha256:\" and 64 hexadecimal digits in lower case",
        })
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The registry that a name starts with, or Docker's; and what follows.
fn split_domain(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some(("index.docker.io", rest)) => (DEFAULT_DOMAIN, rest),
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == LOCAL_DOMAIN
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_DOMAIN, name),
    }
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.rsplit_once(':') {
        Some((host, port)) if !domain.ends_with(']') => (host, Some(port)),
        _ => (domain, None),
    };
    let host_is_good = match host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        Some(v6) => !v6.is_empty() && v6.bytes().all(|b| b.is_ascii_hexdigit() || b == b':'),
        None => host.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        }),
    };
    host_is_good
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(component: &str) -> bool {
    let is_word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut rest = component.as_bytes();
    loop {
        let word = rest.iter().take_while(|b| is_word(b)).count();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        if rest.is_empty() {
            return true;
        }
        let separator = rest.iter().take_while(|b| !is_word(b)).count();
        let good = match &rest[..separator] {
            b"." | b"_" | b"__" => true,
            dashes => dashes.iter().all(|&b| b == b'-'),
        };
        if !good {
            return false;
        }
        rest = &rest[separator..];
    }
}

fn is_tag(tag: &str) -> bool {
    (1..=LONGEST_TAG).contains(&tag.len())
        && !tag.starts_with(['.', '-'])
        && tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed_as_docker_does() {
        for (short, long) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("me/app", "docker.io/me/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/a/b:c", "docker.io/a/b:c"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x:Y", "localhost:5000/x:Y"),
            ("quay.io/a/b__c--d.e:v1_2-3", "quay.io/a/b__c--d.e:v1_2-3"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            ("latest", "docker.io/library/latest:latest"),
        ] {
            assert_eq!(complete(short).unwrap(), long, "{short}");
            assert_eq!(complete(long).unwrap(), long);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "x".repeat(250);
        for name in [
            "",
            ":",
            "/",
            "a/",
            "/a",
            "a//b",
            "Busybox",
            "a b",
            "a:",
            "a:-x",
            "a:.x",
            "a___b",
            "a.-b",
            "-a",
            "a-",
            "..",
            "a/../b",
            "a@sha256:00",
            "ex ample.com/a",
            "a.b:x/c",
            "\u{e9}",
            long.as_str(),
        ] {
            assert!(
                matches!(complete(name), Err(Error::BadName { .. })),
                "{name:?}"
            );
        }
    }

    #[test]
    fn a_reference_may_be_a_name_a_digest_or_a_prefix() {
        let hex = "0123456789abcdef".repeat(4);
        let of = |reference: &str| candidates(reference).unwrap();
        assert_eq!(
            of("busybox").names,
            [
                "docker.io/library/busybox:latest",
                "localhost/busybox:latest"
            ]
        );
        assert_eq!(of("docker.io/busybox").names.len(), 1);
        assert_eq!(of("quay.io/a/b").names, ["quay.io/a/b:latest"]);
        for digest in [
            format!("sha256:{hex}"),
            format!("any@sha256:{hex}"),
            hex.clone(),
        ] {
            assert_eq!(of(&digest).digest.as_deref(), Some(hex.as_str()));
        }
        assert_eq!(of("beef").id_prefix.as_deref(), Some("beef"));
        assert_eq!(of("beef").names[0], "docker.io/library/beef:latest");
        assert_eq!(of("bee").id_prefix, None);
        assert!(of("bee").too_short && !of("beef").too_short && !of("bez").too_short);
        assert_eq!(of("beeg").id_prefix, None);
        for bad in ["sha256:12", "a@sha512:00", "a@", "Bad"] {
            assert!(candidates(bad).is_err(), "{bad}");
        }
    }
}
