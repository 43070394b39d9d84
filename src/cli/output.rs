//! What goes to stdout: tables for people, lines and JSON for programs.

use std::io::{self, IsTerminal, Write};

use comfy_table::{Table, presets};
use serde::Serialize;

use super::error::{Error, Result};

/// The switches that every list has.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct ListFormat {
    /// Print a JSON array, one object for each entry.
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Print only what names an entry, one a line.
    #[arg(short, long)]
    pub quiet: bool,
}

impl ListFormat {
    /// Prints `items`: as a table, as names, or as JSON.
    pub fn print<T: Serialize>(
        self,
        items: &[T],
        header: &[&str],
        name: impl Fn(&T) -> String,
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<()> {
        self.print_rows(items, header, name, |item| vec![row(item)])
    }

    /// As `print`, but an item may have any number of rows.
    pub fn print_rows<T: Serialize>(
        self,
        items: &[T],
        header: &[&str],
        name: impl Fn(&T) -> String,
        rows: impl Fn(&T) -> Vec<Vec<String>>,
    ) -> Result<()> {
        if self.json {
            return json(items);
        }
        if self.quiet {
            let lines: Vec<String> = items.iter().map(|item| printable(&name(item))).collect();
            return lines_out(&lines);
        }
        table(header, items.iter().flat_map(rows))
    }
}

/// How much of a long id a table shows.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Cut {
    /// Show ids, digests and commands whole in a table.
    #[arg(long)]
    pub no_trunc: bool,
}

impl Cut {
    /// An id that commands take by its first digits.
    pub fn id(self, id: &str) -> &str {
        if self.no_trunc { id } else { short(id) }
    }

    /// A key with digests in it, which commands take whole: cut for people only, and so that it shows.
    pub fn digests(self, key: &str) -> String {
        if self.no_trunc || !io::stdout().is_terminal() {
            key.to_owned()
        } else {
            cut_digests(key)
        }
    }
}

/// `text` with each sha256 digest in it cut to its first digits.
fn cut_digests(text: &str) -> String {
    /// Hexadecimal digits of a sha256 digest.
    const DIGITS: usize = 64;
    let is_hex = |c: char| c.is_ascii_hexdigit();
    let mut cut = String::with_capacity(text.len());
    for piece in text.split_inclusive(|c| !is_hex(c)) {
        let digits = piece.trim_end_matches(|c| !is_hex(c));
        if digits.len() == DIGITS {
            let rest = &piece[DIGITS..];
            cut.extend([short(digits), "...", rest]);
        } else {
            cut.push_str(piece);
        }
    }
    cut
}

/// Prints a table without borders: a header, then a line for each row.
pub fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| printable(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    lines_out(&[table.trim_fmt()])
}

/// Prints one value as indented JSON.
pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| failed(io::Error::other(error.to_string())))?;
    lines_out(&[text])
}

/// Prints lines.
pub fn lines_out<S: AsRef<str>>(lines: &[S]) -> Result<()> {
    let mut text = String::new();
    for line in lines {
        text.push_str(line.as_ref());
        text.push('\n');
    }
    bytes_out(text.as_bytes())
}

/// Writes bytes as they are.
pub fn bytes_out(bytes: &[u8]) -> Result<()> {
    write_whole(io::stdout().lock(), bytes)
}

/// Writes bytes as they are to stderr.
pub fn bytes_err(bytes: &[u8]) -> Result<()> {
    write_whole(io::stderr().lock(), bytes)
}

fn write_whole(mut out: impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(failed)
}

/// Says something on stderr. That nobody can read it is no reason to fail.
pub fn note(text: &str) {
    let line = format!("{}\n", printable(text));
    // One write, so that lines of several processes do not mix.
    let _ignored = io::stderr().lock().write_all(line.as_bytes());
}

/// Says on stderr that a list is not complete, for so many records cannot be used.
pub fn note_unusable(records: u64) {
    if records > 0 {
        note(&format!(
            "snapctl: {} cannot be used, so that not all is shown; `snapctl system verify` names what is missing, and `snapctl system repair` mends it, or says what to do",
            count(records, "record")
        ));
    }
}

/// Says on stderr why something failed.
pub fn report(error: &Error) {
    let sentence = error.sentence();
    if !sentence.is_empty() {
        note(&format!("snapctl: {sentence}"));
    }
}

/// A JSON document that plyd passed on, as a value; as a string where it is none.
pub fn embedded(document: &[u8]) -> serde_json::Value {
    serde_json::from_slice(document)
        .unwrap_or_else(|_| String::from_utf8_lossy(document).into_owned().into())
}

fn failed(source: io::Error) -> Error {
    Error::Stdio {
        action: "write the output",
        source,
    }
}

/// `text` without control characters: names that others chose must not move our user's cursor.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = (!c.is_control()).then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// A size in powers of 1000, as disks are sold: `12.3 MB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    // Tenths of the unit, rounded down: 999,999 bytes are 999.9 kB, never 1000.0.
    let mut tenths = bytes / 100;
    let mut unit = 0;
    while tenths >= 10_000 && unit + 1 < UNITS.len() {
        tenths /= 1000;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// So many of something: `1 layer`, `2 layers`.
pub fn count(number: u64, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    }
}

/// The first twelve characters of an id, which name it well enough on one node.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// An optional text as a table cell.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_999, "999.9 kB"),
            (1_000_000, "1.0 MB"),
            (1_250_000_000, "1.2 GB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn control_characters_are_shown_not_sent() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(printable("na\u{ef}ve"), "na\u{ef}ve");
    }

    #[test]
    fn digests_are_cut_and_nothing_else() {
        let digest = "0123456789abcdef".repeat(4);
        for (text, cut) in [
            (format!("sha256:{digest}"), "sha256:0123456789ab..."),
            (digest.clone(), "0123456789ab..."),
            (
                format!("extract-1 sha256:{digest}/root"),
                "extract-1 sha256:0123456789ab.../root",
            ),
            (digest[1..].to_owned(), &digest[1..]),
            (format!("{digest}0"), &format!("{digest}0")),
            ("\u{e9}0123".to_owned(), "\u{e9}0123"),
            (String::new(), ""),
        ] {
            assert_eq!(cut_digests(&text), cut);
        }
    }

    #[test]
    fn short_ids() {
        assert_eq!(short("0123456789abcdef"), "0123456789ab");
        assert_eq!(short("abc"), "abc");
    }
}
