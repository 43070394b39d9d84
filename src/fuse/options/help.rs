//! A line for each option, for `plyfs --help`.

use super::table::{Action, TABLE};

/// Options with what follows their names, and what they mean.
const LINES: &[(&str, &str)] = &[
    ("lowerdir=A:B:C", "lower directories, A on top"),
    (
        "lowerdir_file=PATH",
        "a file with more of them, one a line, below those of lowerdir",
    ),
    (
        "view=PATH",
        "packed layers, as plyd makes them, below all directories",
    ),
    (
        "verify=first|always|never",
        "when their contents are checked; first",
    ),
    (
        "upperdir=U",
        "where changes go; without it the mount is read-only",
    ),
    ("workdir=W", "scratch directory on the file system of U"),
    ("ro, rw", "with ro an upper is read and not written to"),
    (
        "suid, nosuid, dev, nodev, exec, noexec",
        "as for mount(8); suid,dev for root",
    ),
    (
        "atime, noatime, diratime, nodiratime",
        "as for mount(8); symbolic links excepted",
    ),
    ("sync, async", "as for mount(8)"),
    ("allow_other", "let in other users; the default for root"),
    (
        "allow_root",
        "let in root and the user who mounts, nobody else",
    ),
    (
        "uidmapping=HOST:SHOWN:LENGTH",
        "show users on disk as others, any number of ranges",
    ),
    ("gidmapping=HOST:SHOWN:LENGTH", "the same of groups"),
    ("squash_to_root", "show everything as owned by root"),
    (
        "squash_to_uid=UID, squash_to_gid=GID",
        "show everything as owned by that user or group",
    ),
    (
        "xattr_permissions=0|1|2",
        "keep owner and mode in an attribute: security. (1), user. (2)",
    ),
    ("static_nlink", "give every directory a link count of 1"),
    ("noxattrs, noxattrs=0|1", "refuse extended attributes"),
    ("acl, noacl", "with noacl, refuse POSIX ACLs"),
    (
        "volatile, fsync=0|1",
        "with volatile or fsync=0, wait for no disk",
    ),
    (
        "userxattr",
        "keep marks in user.overlay.*; the default but for root",
    ),
    ("metacopy=on|off", "copy no data for a change of attributes"),
    (
        "chunk_size=BYTES|off",
        "how much of a large file a write copies; 64K",
    ),
    (
        "copy_whole=BYTES",
        "files up to this length are copied whole; 1M",
    ),
    (
        "complete=SECONDS|off",
        "how often files that are largely copied are completed; 30",
    ),
    ("threads=N", "threads that answer requests, 1 to 64; 2"),
    ("threaded=0|1", "one thread, or the default of them"),
    (
        "open, no_open",
        "with no_open, do without requests to open files",
    ),
    (
        "writeback, no_writeback, writeback=0|1",
        "gather writes in the kernel; no_writeback",
    ),
    (
        "passthrough, no_passthrough",
        "have the kernel read lower files itself; no_passthrough",
    ),
    ("max_write=BYTES", "the longest write request"),
    (
        "kernel_features=-NAME,+NAME",
        "features of FUSE to do without, see --probe",
    ),
    ("fsname=NAME, subtype=NAME", "what the mount table shows"),
    (
        "context=, fscontext=, defcontext=, rootcontext=",
        "passed on to the kernel",
    ),
    ("max_read=BYTES", "passed on to the kernel"),
    ("debug", "as -d"),
];

/// Values are looked at, and change nothing: it is done in any case, or in another way.
const CHECKED: &[&str] = &[
    "redirect_dir=",
    "index=",
    "xino=",
    "nfs_export=",
    "uuid=",
    "timeout=",
    "fast_ino=",
    "max_threads=",
    "max_idle_threads=",
    "comment=",
];

/// Where the meaning of an option begins.
const INDENT: usize = 33;
/// Longest line: clap breaks longer ones, and indents nothing then.
const WIDTH: usize = 80;

/// The options as `plyfs --help` shows them.
pub fn text() -> String {
    let mut text = "Options of -o, separated by commas; a backslash stands before a comma, a colon or a backslash in a name:\n".to_owned();
    for (option, meaning) in LINES {
        text.push_str(&match option.len() {
            0..=29 => format!("  {option:<30}"),
            _ => format!("  {option}\n  {:<30}", ""),
        });
        fold(&mut text, INDENT, meaning.split(' '), " ");
    }
    let ignored = TABLE
        .iter()
        .filter(|(_, action)| matches!(action, Action::Ignore));
    let ignored = CHECKED.iter().chain(ignored.map(|(name, _)| name));
    let refused = TABLE
        .iter()
        .filter(|(_, action)| matches!(action, Action::Refuse(..)));
    text.push_str("Taken, and without effect here:\n");
    text.push(' ');
    fold(&mut text, 2, ignored.copied(), ", ");
    text.push_str("Known, and refused:\n");
    text.push(' ');
    fold(&mut text, 2, refused.map(|(name, _)| *name), ", ");
    text.push_str("\ndocs/SEMANTICS.md and docs/drop-in.md say more of each.");
    text
}

/// Ends a line, on which all but a space of the indent stands, with words, and goes on in as many as they need.
fn fold<'a>(text: &mut String, indent: usize, words: impl Iterator<Item = &'a str>, between: &str) {
    let mut length = indent;
    let mut words = words.peekable();
    while let Some(word) = words.next() {
        let between = words.peek().map_or("", |_| between.trim_end());
        if length > indent && length + word.len() + between.len() > WIDTH {
            text.push_str(&format!("\n{:indent$}", ""));
            length = indent;
        } else {
            text.push(' ');
        }
        text.push_str(word);
        text.push_str(between);
        length += word.len() + between.len() + 1;
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_has_every_option_and_no_other() {
        let name = |option: &str| {
            option
                .split('=')
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let lines = LINES.iter().flat_map(|(options, _)| options.split(", "));
        let told: Vec<String> = lines.chain(CHECKED.iter().copied()).map(name).collect();
        for (option, action) in TABLE {
            let listed = told.contains(&name(option));
            let by_itself = matches!(action, Action::Ignore | Action::Refuse(..));
            assert!(listed != by_itself, "{option}");
            assert!(text().contains(option.trim_end_matches('=')), "{option}");
        }
        for option in told {
            assert!(
                TABLE.iter().any(|(known, _)| name(known) == option),
                "{option}"
            );
        }
        let help = text();
        let long = help.lines().skip(1).find(|line| line.len() > WIDTH);
        assert_eq!(long, None);
    }
}
