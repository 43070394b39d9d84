//! The tables of the page.

use std::fs;
use std::ops::Range;
use std::sync::OnceLock;

use crate::store::format::short_sum;

/// A row of a table that says what lies where.
#[derive(Debug)]
pub struct Field {
    pub at: usize,
    /// `None` where the page does not say how many there are.
    pub bytes: Option<usize>,
    /// As often as something else says.
    pub is_each: bool,
    pub text: String,
}

impl Field {
    pub fn range(&self) -> Range<usize> {
        self.at..self.at + self.bytes.unwrap()
    }
}

#[derive(Debug)]
pub struct Table(pub Vec<Field>);

/// All of the page.
pub fn page() -> &'static str {
    static PAGE: OnceLock<String> = OnceLock::new();
    PAGE.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/layer-format.md");
        fs::read_to_string(path).unwrap()
    })
}

fn section(heading: &str) -> &'static str {
    let (_, rest) = page().split_once(&format!("# {heading}\n")).unwrap();
    rest.split("\n#").next().unwrap()
}

/// Cells of the rows of the table with this first line, below a heading.
pub fn rows(heading: &str, first: &str) -> Vec<Vec<String>> {
    let lines = section(heading).lines();
    let rows = lines.skip_while(|line| *line != first).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let cells = |row: &str| {
        let cells = row.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    let rows: Vec<Vec<String>> = rows.map(cells).collect();
    assert!(!rows.is_empty(), "{heading}: {first}");
    rows
}

pub fn digits(text: &str) -> Option<usize> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != ',');
    let digits = text[..digits.unwrap_or(text.len())].replace(',', "");
    digits.parse().ok()
}

impl Table {
    pub fn of(heading: &str, title: &str) -> Self {
        let first = format!("| at | bytes | {title} |").replace("  ", " ");
        let field = |row: Vec<String>| {
            Some(Field {
                at: digits(&row[0])?,
                bytes: digits(&row[1]),
                is_each: row[1].ends_with(" each"),
                text: row[2].clone(),
            })
        };
        Self(
            rows(heading, &first)
                .into_iter()
                .filter_map(field)
                .collect(),
        )
    }

    /// One of those that stand beside each other.
    pub fn beside(title: &str) -> Self {
        const FIRST: &str =
            "| object | | extent | | extended attribute | | set | | access time | |";
        let titles: Vec<&str> = FIRST.split('|').map(str::trim).skip(1).step_by(2).collect();
        let column = 2 * titles.iter().position(|found| *found == title).unwrap();
        let rows = rows("Objects, extents, attributes, times", FIRST);
        let field = |row: Vec<String>| {
            let (text, bytes) = row[column + 1].rsplit_once(", ")?;
            Some(Field {
                at: digits(&row[column])?,
                bytes: digits(bytes),
                is_each: false,
                text: text.to_owned(),
            })
        };
        Self(rows.into_iter().filter_map(field).collect())
    }

    /// Fails unless each field begins where the one before it ends, and the last ends there.
    pub fn fills(&self, bytes: usize) {
        let mut end = 0;
        for field in &self.0 {
            assert_eq!(field.at, end, "{field:?}");
            end = field.range().end;
        }
        assert_eq!(end, bytes, "{self:?}");
    }

    pub fn field(&self, text: &str) -> &Field {
        let mut found = self.0.iter().filter(|field| field.text.starts_with(text));
        let field = found.next().unwrap_or_else(|| panic!("{text} in {self:?}"));
        assert!(found.next().is_none(), "{text} in {self:?}");
        field
    }

    pub fn get<'a>(&self, record: &'a [u8], text: &str) -> &'a [u8] {
        &record[self.field(text).range()]
    }

    pub fn number(&self, record: &[u8], text: &str) -> u64 {
        number(self.get(record, text))
    }

    /// Fields of which nothing but zeros is to be written.
    pub fn zeros(&self) -> impl Iterator<Item = usize> {
        let zeros = self.0.iter().filter(|field| field.text == "zero");
        zeros.flat_map(Field::range)
    }

    /// Fails unless what the texts say of fixed values, versions, features and sums is so.
    pub fn holds(&self, bytes: &[u8]) {
        for pair in self.0.windows(2) {
            let (field, next) = (&pair[0], &pair[1]);
            assert!(field.is_each || field.range().end == next.at, "{field:?}");
        }
        for field in &self.0 {
            let (Some(_), text) = (field.bytes, &*field.text) else {
                continue;
            };
            let found = &bytes[field.range()];
            let sum_to = || {
                let (_, to) = text.split_once(" 0 to ").unwrap();
                &bytes[..=digits(to).unwrap()]
            };
            if text.starts_with('`') {
                let mut words = text.split('`').skip(1).step_by(2).map(|word| {
                    let mut word = word.as_bytes().to_vec();
                    word.resize(found.len(), 0);
                    word
                });
                assert!(words.any(|word| word == found), "{text}: {found:?}");
            } else if let Some(version) = text.strip_prefix("version, ") {
                assert_eq!(number(found), digits(version).unwrap() as u64);
            } else if text == "zero" || text.contains("feature") {
                assert!(found.iter().all(|byte| *byte == 0), "{text}: {found:?}");
            } else if text.starts_with("short sum of bytes") {
                assert_eq!(found, short_sum(sum_to()), "{text}");
            } else if text.starts_with("sum of bytes") {
                assert_eq!(found, blake3::hash(sum_to()).as_bytes(), "{text}");
            }
        }
    }
}

pub fn number(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(all)
}

/// The three words, and whether a file with an unknown bit in it is refused.
pub fn features(header: &Table) -> Vec<(Range<usize>, bool)> {
    let refuses = |word: &str| {
        let all = rows(
            "Versions and features",
            "| word | a reader that does not know a bit in it |",
        );
        let row = all.into_iter().find(|row| row[0] == word).unwrap();
        row[1].starts_with("refuses")
    };
    let words = ["compatible", "read-only compatible", "incompatible"];
    let together = header
        .0
        .iter()
        .find(|field| field.text == "the three feature words");
    let ranges: Vec<_> = match together {
        Some(field) => field.range().step_by(8).map(|at| at..at + 8).collect(),
        None => words
            .map(|word| header.field(&format!("{word} features")).range())
            .into(),
    };
    ranges.into_iter().zip(words.map(refuses)).collect()
}
