//! How arguments are read: everything that goes into a gRPC string must be UTF-8, and is refused by
//! name where it is not.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{OsStringValueParser, TypedValueParser};

use super::client::Address;
use super::error::Error;
use crate::grpc::pb::plywood::Volume;
use crate::runtime::signals;

/// A clap parser for [`Address`].
pub fn address() -> impl TypedValueParser<Value = Address> {
    OsStringValueParser::new().try_map(|text| Address::parse(&text))
}

/// A clap parser for text that plyd's protocol has to carry.
pub fn utf8() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().try_map(to_utf8)
}

fn to_utf8(text: OsString) -> Result<String, String> {
    text.into_string().map_err(|text| {
        format!(
            "{text:?} is not UTF-8, and plyd's protocol carries nothing else here; \
             rename it, or write it from inside the container"
        )
    })
}

/// A clap parser for a name to give or to look for. An empty one comes of a variable that is not set.
pub fn name() -> impl TypedValueParser<Value = String> {
    name_or("\"\" is no name; give one")
}

/// The same for an argument that need not be there.
pub fn optional_name() -> impl TypedValueParser<Value = String> {
    name_or("\"\" is no name; give one, or leave the argument out")
}

fn name_or(problem: &'static str) -> impl TypedValueParser<Value = String> {
    utf8().try_map(move |text| match text.as_str() {
        "" => Err(problem),
        _ => Ok(text),
    })
}

/// The first of words that have one parser for all: `what` it names.
pub fn named(word: Option<String>, what: &str) -> Result<String, Error> {
    let word = word.filter(|word| !word.is_empty());
    word.ok_or_else(|| Error::Input(format!("{what}: \"\" is no name; give one")))
}

/// A clap parser for a text that says nothing when it is empty. An empty one comes of a variable that is not set.
pub fn filled() -> impl TypedValueParser<Value = String> {
    utf8().try_map(|text| match text.as_str() {
        "" => Err("\"\" says nothing; give a value, or leave the option out"),
        _ => Ok(text),
    })
}

/// A clap parser for how many `things`.
pub fn count<T>(things: &'static str, most: T) -> impl TypedValueParser<Value = T>
where
    T: FromStr + Display + Clone + Send + Sync + 'static,
{
    utf8().try_map(move |text| {
        let number = text.parse();
        number.map_err(|_| {
            format!("{text:?} is not a number of {things}: write one from 0 to {most}")
        })
    })
}

/// A clap parser for `KEY=VALUE`.
pub fn label() -> impl TypedValueParser<Value = (String, String)> {
    utf8().try_map(|text| parse_label(&text))
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not a label: write KEY=VALUE")),
    }
}

/// A clap parser for the name or number of a signal.
pub fn signal() -> impl TypedValueParser<Value = String> {
    utf8().try_map(|text| match signals::parse(&text) {
        Some(_) => Ok(text),
        None => Err(signals::unknown(&text)),
    })
}

/// A clap parser for `-e KEY=VALUE`, or `-e KEY` for the value that snapctl itself has. A `KEY` that
/// snapctl does not have is left out, as Docker does.
pub fn env() -> impl TypedValueParser<Value = EnvVar> {
    OsStringValueParser::new().try_map(|text| {
        let text = to_utf8(text)?;
        parse_env(&text, |key| std::env::var_os(key))
    })
}

/// An environment variable for a container; `None` when it was to be inherited and is not set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvVar(pub Option<String>);

/// The variables of a list of options, those left out removed.
pub fn env_list(vars: &[EnvVar]) -> Vec<String> {
    vars.iter().filter_map(|var| var.0.clone()).collect()
}

fn parse_env(text: &str, own: impl Fn(&str) -> Option<OsString>) -> Result<EnvVar, String> {
    let key = text.split_once('=').map_or(text, |(key, _)| key);
    if key.is_empty() {
        return Err(format!("{text:?} names no variable: write KEY=VALUE"));
    }
    if key.len() < text.len() {
        return Ok(EnvVar(Some(text.to_owned())));
    }
    match own(key) {
        None => Ok(EnvVar(None)),
        Some(value) => to_utf8(value).map(|value| EnvVar(Some(format!("{key}={value}")))),
    }
}

/// A clap parser for `-v SOURCE:TARGET[:ro|:rw]`.
pub fn volume() -> impl TypedValueParser<Value = Volume> {
    OsStringValueParser::new().try_map(|text| {
        let text = to_utf8(text)?;
        let here = std::env::current_dir().map_err(|error| {
            format!("{text:?} cannot be resolved, the current directory is gone: {error}")
        });
        parse_volume(&text, || here.clone())
    })
}

fn parse_volume(text: &str, here: impl Fn() -> Result<PathBuf, String>) -> Result<Volume, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, mode) = match parts[..] {
        [source, target] => (source, target, "rw"),
        [source, target, mode] => (source, target, mode),
        _ => return Err(format!("{text:?} is not SOURCE:TARGET or SOURCE:TARGET:ro")),
    };
    let read_only = match mode {
        "ro" => true,
        "rw" => false,
        _ => {
            return Err(format!(
                "{mode:?} is not a mode of a volume: write ro or rw"
            ));
        }
    };
    if !target.starts_with('/') {
        return Err(format!("the target {target:?} has to start with /"));
    }
    let source = if source.starts_with('/') {
        source.to_owned()
    } else if matches!(source, "." | "..") || source.starts_with("./") || source.starts_with("../")
    {
        to_utf8(here()?.join(source).into_os_string())?
    } else {
        return Err(format!(
            "the source {source:?} is not a path; there are no named volumes, \
             write ./{source} for a directory here"
        ));
    };
    Ok(Volume {
        source,
        target: target.to_owned(),
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn text_that_is_not_utf8_is_named() {
        let error = to_utf8(OsString::from_vec(b"a\xffb".to_vec())).unwrap_err();
        assert!(error.contains(r#""a\xFFb" is not UTF-8"#), "{error}");
    }

    #[test]
    fn labels() {
        let pair = |key: &str, value: &str| Ok((key.to_owned(), value.to_owned()));
        assert_eq!(parse_label("a=b=c"), pair("a", "b=c"));
        assert_eq!(parse_label("d="), pair("d", ""));
        assert!(parse_label("a").is_err());
        assert!(parse_label("=b").is_err());
    }

    #[test]
    fn variables() {
        let own = |key: &str| (key == "HOME").then(|| OsString::from("/root"));
        let parse = |text| parse_env(text, own);
        assert_eq!(parse("A=b=c"), Ok(EnvVar(Some("A=b=c".into()))));
        assert_eq!(parse("A="), Ok(EnvVar(Some("A=".into()))));
        assert_eq!(parse("HOME"), Ok(EnvVar(Some("HOME=/root".into()))));
        assert_eq!(parse("NOPE"), Ok(EnvVar(None)));
        assert!(parse("=x").is_err());
        assert!(parse("").is_err());
    }

    #[test]
    fn volumes() {
        let parse = |text| parse_volume(text, || Ok("/here".into()));
        let volume = |source: &str, target: &str, read_only| {
            Ok(Volume {
                source: source.into(),
                target: target.into(),
                read_only,
            })
        };
        assert_eq!(parse("/a:/b"), volume("/a", "/b", false));
        assert_eq!(parse("/a:/b:ro"), volume("/a", "/b", true));
        assert_eq!(parse("./a:/b:rw"), volume("/here/./a", "/b", false));
        for bad in [
            "/a",
            "a:/b",
            "/a:b",
            "/a:/b:rx",
            "/a:/b:ro:x",
            ":/b",
            "/a:",
            "",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
