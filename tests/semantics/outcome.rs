//! What a row says of a file system: `yes` when its sentence holds, otherwise one word.

use std::fmt;
use std::io;

/// Why the sentence of a row does not hold: the name of an error, or a word of the row's own.
#[derive(Debug, PartialEq, Eq)]
pub struct Said(pub String);

/// What a row comes to.
pub type Outcome = Result<(), Said>;

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<io::Error> for Said {
    fn from(error: io::Error) -> Self {
        Self(error.raw_os_error().map_or_else(
            || error.kind().to_string(),
            |code| format!("{:?}", nix::Error::from_raw(code)),
        ))
    }
}

impl From<nix::Error> for Said {
    fn from(errno: nix::Error) -> Self {
        Self(format!("{errno:?}"))
    }
}

impl From<rustix::io::Errno> for Said {
    fn from(errno: rustix::io::Errno) -> Self {
        nix::Error::from_raw(errno.raw_os_error()).into()
    }
}

/// Nothing, or the word.
pub fn expect(holds: bool, otherwise: &str) -> Outcome {
    if holds {
        Ok(())
    } else {
        Err(Said(otherwise.to_owned()))
    }
}

/// The operation must fail with this error.
pub fn fails<T, E: Into<Said>>(result: Result<T, E>, errno: nix::Error) -> Outcome {
    match result {
        Ok(_) => Err(Said("allowed".to_owned())),
        Err(error) => {
            let said = error.into();
            if said == Said::from(errno) {
                Ok(())
            } else {
                Err(said)
            }
        }
    }
}
