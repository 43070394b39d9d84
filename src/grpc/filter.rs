//! containerd's filter language, as its API's List calls take it.
//!
//! ```text
//! filter   := selector ("," selector)*            all must match
//! selector := path (operator value)?              without an operator: the field is there
//! path     := field ("." field)*
//! field    := quoted | [A-Za-z0-9_]+
//! operator := "==" | "!=" | "~="                  the last is a regular expression
//! value    := quoted | [^\s,]+
//! quoted   := Go's string syntax; after "~=" also between slashes or bars
//! ```
//!
//! Of several filters one has to match; none at all, or an empty one, matches everything. A field
//! that is not there is equal to nothing, and unequal to everything but the empty string.

use regex::Regex;

/// A list of filters, any of which may match.
#[derive(Debug)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

/// A filter that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot read the filter {filter:?}: {problem} at byte {position}")]
pub struct SyntaxError {
    filter: String,
    position: usize,
    problem: String,
}

impl Filters {
    /// Reads the filters of one request.
    pub fn parse(filters: &[String]) -> Result<Self, SyntaxError> {
        filters
            .iter()
            .map(|filter| Parser::new(filter).filter())
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether an object matches, whose fields `field` looks up by their path.
    pub fn matches<'a>(&self, field: impl Fn(&[String]) -> Option<&'a str>) -> bool {
        let matches = |selector: &Selector| {
            let value = field(&selector.path);
            match &selector.test {
                Test::Present => value.is_some(),
                Test::Equal(wanted) => value == Some(wanted),
                Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
                Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
            }
        };
        self.0.is_empty() || self.0.iter().any(|selectors| selectors.iter().all(matches))
    }
}

struct Parser<'a> {
    input: &'a str,
    position: usize,
}

impl<'a> Parser<'a> {
    fn new(input: &'a str) -> Self {
        Self { input, position: 0 }
    }

    fn filter(mut self) -> Result<Vec<Selector>, SyntaxError> {
        if self.input.is_empty() {
            return Ok(Vec::new());
        }
        let mut selectors = vec![self.selector()?];
        loop {
            self.skip_space();
            match self.take() {
                None => return Ok(selectors),
                Some(',') => selectors.push(self.selector()?),
                Some(other) => {
                    return Err(self.error_before(other, format!("unexpected {other:?}")));
                }
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, SyntaxError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.take();
            path.push(self.field()?);
        }
        self.skip_space();
        if matches!(self.peek(), None | Some(',')) {
            let test = Test::Present;
            return Ok(Selector { path, test });
        }
        let operator = self.run_of(|c| matches!(c, '=' | '!' | '~'));
        let test = match operator {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => {
                let value = self.value(true)?;
                let regex = Regex::new(&value).map_err(|error| self.error(error.to_string()))?;
                Test::Matches(regex)
            }
            _ => return Err(self.error("expected one of == != ~=".to_owned())),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, SyntaxError> {
        self.skip_space();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        match self.run_of(|c| c == '_' || c.is_ascii_alphanumeric()) {
            "" => Err(self.error("expected a field".to_owned())),
            field => Ok(field.to_owned()),
        }
    }

    fn value(&mut self, other_quotes: bool) -> Result<String, SyntaxError> {
        self.skip_space();
        match self.peek() {
            Some('"') => return self.quoted(),
            Some('/' | '|') if other_quotes => return self.quoted(),
            Some('/' | '|') => {
                return Err(self.error("slashes and bars quote after ~= only".to_owned()));
            }
            Some('.' | '=' | '!' | '~') => {}
            _ => {
                let value = self.run_of(|c| c != ',' && !c.is_whitespace() && !c.is_control());
                if !value.is_empty() {
                    return Ok(value.to_owned());
                }
            }
        }
        Err(self.error("expected a value".to_owned()))
    }

    /// A literal in Go's string syntax, up to the character that it starts with.
    fn quoted(&mut self) -> Result<String, SyntaxError> {
        let quote = self.take();
        // Escapes may give single bytes of a character.
        let mut bytes = Vec::new();
        loop {
            match self.take() {
                None | Some('\n') => return Err(self.error("the quote does not end".to_owned())),
                end if end == quote => break,
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(plain) => push(&mut bytes, plain),
            }
        }
        String::from_utf8(bytes).map_err(|_| self.error("the quote is not UTF-8".to_owned()))
    }

    fn escape(&mut self, quote: Option<char>, bytes: &mut Vec<u8>) -> Result<(), SyntaxError> {
        let illegal = |this: &Self| this.error("illegal escape sequence".to_owned());
        let escape = self.take().ok_or_else(|| illegal(self))?;
        let simple = match escape {
            'a' => Some('\x07'),
            'b' => Some('\x08'),
            'f' => Some('\x0c'),
            'n' => Some('\n'),
            'r' => Some('\r'),
            't' => Some('\t'),
            'v' => Some('\x0b'),
            '\\' => Some('\\'),
            other if Some(other) == quote => Some(other),
            _ => None,
        };
        if let Some(simple) = simple {
            push(bytes, simple);
            return Ok(());
        }
        let (digits, radix) = match escape {
            'x' => (2, 16),
            'u' => (4, 16),
            'U' => (8, 16),
            '0'..='7' => {
                self.position -= 1;
                (3, 8)
            }
            _ => return Err(illegal(self)),
        };
        let mut value = 0;
        for _ in 0..digits {
            let digit = self.take().and_then(|c| c.to_digit(radix));
            value = value * radix + digit.ok_or_else(|| illegal(self))?;
        }
        if matches!(escape, 'u' | 'U') {
            push(bytes, char::from_u32(value).ok_or_else(|| illegal(self))?);
        } else {
            bytes.push(u8::try_from(value).map_err(|_| illegal(self))?);
        }
        Ok(())
    }

    fn peek(&self) -> Option<char> {
        self.input[self.position..].chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.position += next.len_utf8();
        Some(next)
    }

    fn run_of(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.input[self.position..];
        let length = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.position += length;
        &rest[..length]
    }

    fn skip_space(&mut self) {
        self.run_of(char::is_whitespace);
    }

    fn error(&self, problem: String) -> SyntaxError {
        SyntaxError {
            filter: self.input.to_owned(),
            position: self.position,
            problem,
        }
    }

    fn error_before(&self, taken: char, problem: String) -> SyntaxError {
        SyntaxError {
            position: self.position - taken.len_utf8(),
            ..self.error(problem)
        }
    }
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(filters: &[&str]) -> Result<Filters, SyntaxError> {
        let filters: Vec<String> = filters.iter().map(|f| (*f).to_owned()).collect();
        Filters::parse(&filters)
    }

    /// Matches against a snapshot `name=foo`, `parent=""`, `kind=active`, labels `a.b/c=x y` and `empty=`.
    fn matches(filters: &[&str]) -> bool {
        parse(filters).unwrap().matches(|path| {
            let (first, rest) = path.split_first()?;
            match (first.as_str(), rest.join(".").as_str()) {
                ("name", "") => Some("foo"),
                ("parent", "") => Some(""),
                ("kind", "") => Some("active"),
                ("labels", "a.b/c") => Some("x y"),
                ("labels", "plain") => Some("1"),
                ("labels", "empty") => Some(""),
                _ => None,
            }
        })
    }

    #[test]
    fn what_matches() {
        for filters in [
            &[][..],
            &[""],
            &["name"],
            &["name==foo"],
            &[" name == foo "],
            &["name==\"foo\""],
            &["name!=bar"],
            &["name~=^f"],
            &["name~=/^fo+$/"],
            &["name~=|o|"],
            &["name==foo,kind==active"],
            &["name==bar", "kind==active"],
            &["parent"],
            &["parent==\"\""],
            &["labels.\"a.b/c\"==\"x y\""],
            &["labels.\"a.b/c\"==\"\\x78\\040\\u0079\""],
            &["labels.plain==1"],
            &["labels.empty"],
            &["labels.missing!=x"],
            &["unknown!=x"],
            &["name!=a=b"],
        ] {
            assert!(matches(filters), "{filters:?}");
        }
    }

    #[test]
    fn what_does_not_match() {
        for filters in [
            &["name==bar"][..],
            &["name==fo"],
            &["name!=foo"],
            &["name~=^o"],
            &["name==foo,kind==view"],
            &["labels.missing"],
            &["labels.missing==\"\""],
            &["labels.missing!=\"\""],
            &["unknown"],
            &["name==bar", "name==baz"],
        ] {
            assert!(!matches(filters), "{filters:?}");
        }
    }

    #[test]
    fn what_is_refused() {
        for filter in [
            ",",
            "name,",
            "name==",
            "name== ,kind",
            "name=foo",
            "name===foo",
            "name==foo bar",
            "name==foo,,kind",
            "==foo",
            "name.",
            ".name",
            "name==\"foo",
            "name==\"f\noo\"",
            "name==\"\\q\"",
            "name==\"\\xf\"",
            "name==\"\\xff\"",
            "name==\"\\400\"",
            "name==\"\\ud800\"",
            "name==/foo/",
            "name~=/foo",
            "name~=(",
            "name==.foo",
            "name==\u{1}",
            "na\u{e9}==x",
            "name|x",
        ] {
            let error = parse(&[filter]).unwrap_err().to_string();
            assert!(error.contains("cannot read the filter"), "{filter:?}");
        }
    }
}
