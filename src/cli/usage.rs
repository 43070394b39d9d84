//! How a command line that makes no sense is told: a sentence as for every other failure, then how the
//! command is written. clap's own words are several paragraphs, and some of its tips are wrong here.

use std::error::Error as _;
use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use super::error::BROKEN_PIPE;
use super::output;
use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// The names of the subcommands, outermost first, that a command line has got to.
pub fn path(root: &Command, args: impl Iterator<Item = OsString>) -> Vec<String> {
    let mut args = args.skip(1);
    let mut command = root;
    let mut path = Vec::new();
    while let Some(arg) = args.next() {
        if arg == "--address" {
            args.next();
            continue;
        }
        if arg.as_encoded_bytes().starts_with(b"-") {
            continue;
        }
        let Some(sub) = arg.to_str().and_then(|name| command.find_subcommand(name)) else {
            break;
        };
        path.push(sub.get_name().to_owned());
        command = sub;
    }
    path
}

/// Whether the exit codes of the command at `path` are Docker's.
pub fn is_engine(path: &[String]) -> bool {
    let first = path.first().map(OsStr::new);
    first.is_some_and(|name| name == "run" || name == "exec")
}

/// Says what is wrong with a command line of `root`, at `path` among its commands, or prints the help that it asks
/// for. `code` is the exit code of one that is wrong.
pub fn refuse(error: &clap::Error, root: Command, path: &[String], code: u8) -> ExitCode {
    if let ErrorKind::DisplayHelp | ErrorKind::DisplayVersion = error.kind() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(BROKEN_PIPE),
        };
    }
    for line in explain(error, root, path) {
        output::note(&line);
    }
    ExitCode::from(code)
}

/// The lines for stderr about what `error` refuses of the command at `path`.
pub fn explain(error: &clap::Error, root: Command, path: &[String]) -> Vec<String> {
    let program = root.get_name().to_owned();
    let (mut command, name) = command_at(root, path);
    let mut lines = vec![format!("{program}: {}", sentence(error, &command, &name))];
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let help = command.render_help().to_string();
        lines.extend(help.trim_end().lines().map(str::to_owned));
        return lines;
    }
    lines.extend(how_to_write(&mut command, &name));
    lines
}

/// The lines for stderr that follow what was refused after clap had taken it.
pub fn advice(root: Command, path: &[String]) -> Vec<String> {
    let (mut command, name) = command_at(root, path);
    how_to_write(&mut command, &name)
}

/// The command at `path`, and what it is called.
fn command_at(mut root: Command, path: &[String]) -> (Command, String) {
    root.build();
    let mut command = root;
    // Each was found there before.
    for name in path {
        let Some(sub) = command.find_subcommand(name) else {
            break;
        };
        command = sub.clone();
    }
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let name = name.to_owned();
    (command, name)
}

fn how_to_write(command: &mut Command, name: &str) -> Vec<String> {
    let usage = command.render_usage().to_string();
    let mut lines: Vec<_> = usage.lines().map(str::to_owned).collect();
    lines.push(format!("`{name} --help` says more"));
    lines
}

fn sentence(error: &clap::Error, command: &Command, name: &str) -> String {
    let get = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    let argument = get(ContextKind::InvalidArg);
    let value = get(ContextKind::InvalidValue);
    // Without the name of its value, or what marks a place.
    let option = argument.split_whitespace().next().unwrap_or_default();
    let is_place = !option.starts_with('-');
    let option = option.trim_matches(['<', '>', '[', ']', '.']);
    match error.kind() {
        ErrorKind::UnknownArgument if argument.starts_with('-') => {
            let longs = command.get_arguments().filter_map(clap::Arg::get_long);
            let near = nearest(&argument, longs.map(|long| format!("--{long}")));
            let near = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
            format!("`{name}` has no option {argument}{near}")
        }
        ErrorKind::UnknownArgument if name == "snapctl image load" => format!(
            "the archive is named with -i: `snapctl image load -i {argument}`, or read from stdin"
        ),
        ErrorKind::UnknownArgument => {
            format!("{argument:?} is one argument too many for `{name}`")
        }
        ErrorKind::TooManyValues if is_place => {
            format!("{value:?} is one argument too many for `{name}`")
        }
        ErrorKind::InvalidSubcommand => {
            let wanted = get(ContextKind::InvalidSubcommand);
            let names = command.get_subcommands().map(Command::get_name);
            let near = nearest(&wanted, names.map(str::to_owned));
            let near = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
            format!("`{name}` has no command {wanted:?}{near}")
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            let names: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
            format!("name a command of `{name}`: {}", names.join(", "))
        }
        ErrorKind::InvalidValue => {
            let choice = match error.get(ContextKind::ValidValue) {
                Some(ContextValue::Strings(values)) if !values.is_empty() => values.join(", "),
                _ => String::new(),
            };
            match (value.as_str(), choice.as_str()) {
                ("", "") => format!("{option} needs a value"),
                ("", choice) => format!("{option} needs a value, one of {choice}"),
                (value, "") => format!("{option} cannot be {value:?}"),
                (value, choice) => format!("{option} cannot be {value:?}; it is one of {choice}"),
            }
        }
        ErrorKind::ValueValidation => {
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            // Our own parsers quote what they refuse.
            match cause.contains('"') {
                true => format!("{option}: {cause}"),
                false => format!("{option} cannot be {value:?}: {cause}"),
            }
        }
        ErrorKind::MissingRequiredArgument => {
            let names = places(&argument);
            let verb = if names.len() == 1 { "is" } else { "are" };
            format!("{} {verb} missing", names.join(" and "))
        }
        ErrorKind::TooFewValues => format!(
            "{} are needed, and not all of them are given",
            places(&argument).join(" and ")
        ),
        ErrorKind::TooManyValues => format!("{option} takes no value; leave out {value:?}"),
        ErrorKind::ArgumentConflict => {
            let prior = get(ContextKind::PriorArg);
            match prior.split_whitespace().next() {
                Some(prior) if prior != option => {
                    format!("{option} and {prior} exclude each other")
                }
                _ => format!("{option} is given twice"),
            }
        }
        ErrorKind::InvalidUtf8 => {
            "an argument is not UTF-8, and plyd's protocol carries nothing else here".to_owned()
        }
        _ => {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            let first = text.split("\n\n").next().unwrap_or_default();
            first.split_whitespace().collect::<Vec<_>>().join(" ")
        }
    }
}

/// What clap calls `<KEY>, <DIR>...`, as words.
fn places(arguments: &str) -> Vec<&str> {
    arguments
        .split([' ', ','])
        .map(|word| word.trim_matches(['<', '>', '[', ']', '.']))
        .filter(|word| !word.is_empty())
        .collect()
}

/// What the user may have meant: as good as the same, not merely something alike.
fn nearest(word: &str, known: impl Iterator<Item = String>) -> Option<String> {
    let farthest = (word.trim_start_matches('-').len() / 3).max(1);
    known
        .map(|known| (strsim::damerau_levenshtein(word, &known), known))
        .filter(|(distance, known)| *distance <= farthest || is_begun(word, known))
        .min()
        .map(|(_, known)| known)
}

/// `--interact` is `--interactive`.
fn is_begun(word: &str, known: &str) -> bool {
    word.trim_start_matches('-').len() >= 3 && known.starts_with(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_are_what_was_meant() {
        let known = ["--json", "--quiet", "--interactive", "--rm", "--name"];
        let near = |word: &str| nearest(word, known.iter().map(|known| (*known).to_owned()));
        assert_eq!(near("--jsn").as_deref(), Some("--json"));
        assert_eq!(near("--quite").as_deref(), Some("--quiet"));
        assert_eq!(near("--interact").as_deref(), Some("--interactive"));
        for other in ["--nope", "--memory", "--publish", "-x", "--no"] {
            assert_eq!(near(other), None, "{other}");
        }
    }

    #[test]
    fn places_are_words() {
        assert_eq!(places("<KEY>, <DIR>"), ["KEY", "DIR"]);
        assert_eq!(places("<CONTAINER> <COMMAND>..."), ["CONTAINER", "COMMAND"]);
    }
}
