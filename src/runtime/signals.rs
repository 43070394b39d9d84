//! Signals by name or number.

use std::str::FromStr;

use nix::sys::signal::Signal;

/// The highest signal number.
const HIGHEST: i32 = 64;

/// The number of a signal: `15`, `TERM`, `SIGTERM`, `sigterm`, `RTMIN+3`. `None`: there is no such signal.
pub fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse() {
        return (1..=HIGHEST).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        return real_time(libc::SIGRTMIN(), offset, '+');
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        return real_time(libc::SIGRTMAX(), offset, '-');
    }
    Signal::from_str(&format!("SIG{name}"))
        .ok()
        .map(|signal| signal as i32)
}

/// What to say of a text that [`parse`] does not know.
pub fn unknown(text: &str) -> String {
    let names: Vec<_> = Signal::iterator()
        .filter_map(|signal| signal.as_str().strip_prefix("SIG"))
        .collect();
    format!(
        "there is no signal {text:?}; use a number from 1 to {HIGHEST} or a name: {}, RTMIN+N, RTMAX-N",
        names.join(", ")
    )
}

fn real_time(base: i32, offset: &str, sign: char) -> Option<i32> {
    let distance: i32 = match offset {
        "" => 0,
        offset => offset
            .strip_prefix(sign)?
            .parse()
            .ok()
            .filter(|&n| n >= 0)?,
    };
    let number = if sign == '+' {
        base.checked_add(distance)?
    } else {
        base.checked_sub(distance)?
    };
    (libc::SIGRTMIN()..=libc::SIGRTMAX())
        .contains(&number)
        .then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, number) in [
            ("15", Some(15)),
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("Kill", Some(9)),
            ("RTMIN+3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("64", Some(64)),
            ("0", None),
            ("65", None),
            ("-9", None),
            ("RTMIN-1", None),
            ("RTMIN+99", None),
            ("NOSUCH", None),
            ("", None),
        ] {
            assert_eq!(parse(text), number, "{text}");
        }
    }

    #[test]
    fn every_name_that_is_offered_is_known() {
        let text = unknown("BOGUS");
        assert!(text.contains("\"BOGUS\"") && text.contains("SYS, RTMIN+N"));
        let (_, names) = text.split_once("a name: ").unwrap();
        for name in names.split(", ").filter(|name| !name.starts_with("RT")) {
            assert!(parse(name).is_some(), "{name}");
        }
    }
}
