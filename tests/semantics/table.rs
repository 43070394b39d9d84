//! The table in `docs/SEMANTICS.md`: read to compare, written anew on request.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::base::Base;
use crate::fill::Fill;
use crate::place::{Peer, Place};
use crate::row::Row;

const BEGIN: &str = "<!-- the table; `UPDATE_TABLE=1 cargo test --test semantics` writes it -->\n";
const END: &str = "<!-- end of the table -->\n";

/// Outcomes by the name of the row, in the order of the columns.
pub type Table = HashMap<String, Vec<String>>;

fn document() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/SEMANTICS.md")
}

/// The versions that the columns of the peers are of, as the document states them.
pub fn versions() -> (String, String) {
    let release = nix::sys::utsname::uname().unwrap();
    let release = release.release().to_str().unwrap();
    let kernel: Vec<&str> = release.split('.').take(2).collect();
    let output = Command::new("fuse-overlayfs").arg("--version").output();
    let output = output.map_or(String::new(), |output| {
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    let fuse_overlayfs = output
        .lines()
        .find_map(|line| line.strip_prefix("fuse-overlayfs: version "))
        .unwrap_or("none");
    (kernel.join("."), fuse_overlayfs.to_owned())
}

/// The part of the document between the marks, and what is around it.
fn split() -> (String, String, String) {
    let text = fs::read_to_string(document()).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the table's beginning");
    let (table, after) = rest.split_once(END).expect("the table's end");
    (before.to_owned(), table.to_owned(), after.to_owned())
}

/// Which columns the document's table can be held to on this host.
pub fn comparable(base: &Base) -> Vec<bool> {
    let (_, table, _) = split();
    let (kernel, fuse_overlayfs) = versions();
    let kernel = table.contains(&format!("Linux {kernel},"));
    let fuse_overlayfs = table.contains(&format!("fuse-overlayfs {fuse_overlayfs}."));
    let overlay = kernel && mounts(Peer::Overlay, base);
    let overlay_all = kernel && mounts(Peer::OverlayAll, base);
    vec![base.is_ext4(), overlay, overlay_all, fuse_overlayfs, true]
}

/// Whether this host mounts it at all.
fn mounts(peer: Peer, base: &Base) -> bool {
    let dir = base.directory();
    let fill = Fill::new(&dir.path().join("layers"));
    let place = Place::new(peer, "", dir.path(), &fill, false);
    place.is_ok_and(|place| place.unmount().is_ok())
}

/// What rows come to on plyfs with other options, where it is not what the table says.
pub fn exceptions(options: &str) -> HashMap<String, String> {
    let text = fs::read_to_string(document()).unwrap();
    let rows = text.lines().filter_map(|line| {
        let line = line.strip_prefix("| ")?.strip_suffix(" |")?;
        let mut cells = line.split(" | ");
        let (mounted, row, outcome) = (cells.next()?, cells.next()?, cells.next()?);
        let has = mounted.split("`").any(|word| word == options);
        has.then(|| (row.trim_matches('`').to_owned(), outcome.to_owned()))
    });
    rows.collect()
}

/// What the document says.
pub fn read() -> Table {
    let (_, table, _) = split();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let mut cells = row.trim_end_matches(" |").split(" | ");
        let name = cells.next().unwrap().trim_end_matches('`').to_owned();
        let outcomes = cells.skip(1).map(str::to_owned).collect();
        (name, outcomes)
    })
    .collect()
}

/// Puts what ran in place of what the document says.
pub fn write(rows: &[Row], table: &Table) {
    let (before, _, after) = split();
    let (kernel, fuse_overlayfs) = versions();
    let mut text = format!(
        "The columns are of ext4, of kernel overlayfs in Linux {kernel}, once as it comes and once with\n\
         `redirect_dir=on,index=on,metacopy=on,xino=on`, and of fuse-overlayfs {fuse_overlayfs}.\n"
    );
    let mut chapter = "";
    for row in rows {
        let now = row.name.split("::").next().unwrap();
        if now != chapter {
            chapter = now;
            text += &format!(
                "\n### {chapter}\n\n\
                 | row | what holds | ext4 | overlayfs | overlayfs, all on | fuse-overlayfs | plywood |\n\
                 |---|---|---|---|---|---|---|\n"
            );
        }
        let Some(outcomes) = table.get(&row.name) else {
            continue;
        };
        let outcomes = outcomes.join(" | ");
        text += &format!("| `{}` | {} | {outcomes} |\n", row.name, row.promise);
    }
    fs::write(document(), format!("{before}{BEGIN}{text}{END}{after}")).unwrap();
}

/// Whether a cell says this outcome; where a peer's varies it has both, with an `or` between them.
pub fn allows(cell: &str, outcome: &str) -> bool {
    cell.split(" or ").any(|word| word == outcome)
}

/// A dash for what was not asked.
pub fn column(outcome: Option<String>) -> String {
    outcome.unwrap_or_else(|| "-".to_owned())
}

/// The columns' peers.
pub const COLUMNS: [Peer; 5] = Peer::ALL;
