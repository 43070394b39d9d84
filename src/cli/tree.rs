//! The tree of snapshots: parents above their children.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use super::output::printable;
use super::snapshot::SnapshotView;

/// A snapshot and what stands on it.
#[derive(Serialize)]
pub struct Node {
    #[serde(flatten)]
    snapshot: SnapshotView,
    children: Vec<Node>,
}

/// For each snapshot the index of its parent, where the list has it. A key is unique within an owner
/// only: a snapshot's own owner goes first, then that of images, then any.
fn parents(snapshots: &[SnapshotView]) -> Vec<Option<usize>> {
    let mut by_key: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, snapshot) in snapshots.iter().enumerate() {
        if snapshot.kind == "committed" {
            by_key.entry(&snapshot.key).or_default().push(index);
        }
    }
    let find = |child: &SnapshotView| {
        let candidates = by_key.get(child.parent.as_deref()?)?;
        let owned_by = |owner: &str| {
            let mut of_owner = candidates.iter().filter(|i| snapshots[**i].owner == owner);
            of_owner.next()
        };
        owned_by(&child.owner)
            .or_else(|| owned_by("image"))
            .or_else(|| candidates.first())
            .copied()
    };
    snapshots.iter().map(find).collect()
}

/// Lists of children by parent, then the roots.
fn children(parents: &[Option<usize>]) -> (Vec<Vec<usize>>, Vec<usize>) {
    let mut children = vec![Vec::new(); parents.len()];
    let mut roots = Vec::new();
    for (index, parent) in parents.iter().enumerate() {
        match parent {
            Some(parent) if *parent != index => children[*parent].push(index),
            _ => roots.push(index),
        }
    }
    (children, roots)
}

/// The keys, each after that of its parent.
pub fn keys(snapshots: &[SnapshotView]) -> Vec<String> {
    let mut keys = Vec::new();
    walk(snapshots, |snapshot, _| keys.push(printable(&snapshot.key)));
    keys
}

/// The tree as lines, with each key as `shown` has it.
pub fn lines(snapshots: &[SnapshotView], shown: impl Fn(&str) -> String) -> Vec<String> {
    let mut lines = Vec::new();
    walk(snapshots, |snapshot, prefix| {
        let mounted = if snapshot.mountpoint.is_some() {
            ", mounted"
        } else {
            ""
        };
        lines.push(format!(
            "{prefix}{} ({} {}{mounted})",
            printable(&shown(&snapshot.key)),
            snapshot.owner,
            snapshot.kind
        ));
    });
    lines
}

/// Parents before their children; with each what is drawn before it.
fn walk(snapshots: &[SnapshotView], mut visit: impl FnMut(&SnapshotView, &str)) {
    let (children, roots) = children(&parents(snapshots));
    // What is still to be printed, the next one last: an index, the prefix of its line, and the
    // prefix of its children's lines. A stack of our own, since chains can be deep.
    let mut stack: Vec<(usize, String, String)> = Vec::new();
    for root in roots.into_iter().rev() {
        stack.push((root, String::new(), String::new()));
    }
    while let Some((index, prefix, below)) = stack.pop() {
        visit(&snapshots[index], &prefix);
        let count = children[index].len();
        for (place, child) in children[index].iter().enumerate().rev() {
            let (branch, rest) = match place + 1 == count {
                true => ("`-- ", "    "),
                false => ("|-- ", "|   "),
            };
            stack.push((*child, format!("{below}{branch}"), format!("{below}{rest}")));
        }
    }
}

/// The tree as nested values.
pub fn nested(snapshots: Vec<SnapshotView>) -> Vec<Node> {
    let parents = parents(&snapshots);
    let order = children_first(&parents);
    let mut nodes: Vec<Option<Node>> = snapshots
        .into_iter()
        .map(|snapshot| {
            Some(Node {
                snapshot,
                children: Vec::new(),
            })
        })
        .collect();
    let mut roots = Vec::new();
    for index in order {
        let Some(mut node) = nodes[index].take() else {
            continue;
        };
        // They were put in from the last to the first.
        node.children.reverse();
        match parents[index].and_then(|parent| nodes[parent].as_mut()) {
            Some(parent) => parent.children.push(node),
            None => roots.push(node),
        }
    }
    roots.reverse();
    roots
}

/// All indices, each child before its parent, later ones first among equals.
fn children_first(parents: &[Option<usize>]) -> Vec<usize> {
    let (children, roots) = children(parents);
    let mut order = Vec::new();
    let mut stack: Vec<usize> = roots.into_iter().rev().collect();
    let mut seen = HashSet::new();
    while let Some(index) = stack.pop() {
        if seen.insert(index) {
            order.push(index);
            stack.extend(children[index].iter().rev());
        }
    }
    order.reverse();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::pb::plywood::{Snapshot, SnapshotKind};

    fn snapshot(owner: &str, key: &str, parent: &str) -> SnapshotView {
        let kind = match key.starts_with("active") {
            true => SnapshotKind::Active,
            false => SnapshotKind::Committed,
        };
        Snapshot {
            owner: owner.into(),
            key: key.into(),
            parent: parent.into(),
            kind: kind.into(),
            ..Snapshot::default()
        }
        .into()
    }

    fn forest() -> Vec<SnapshotView> {
        vec![
            snapshot("image", "a", ""),
            snapshot("containerd", "a", ""),
            snapshot("image", "b", "a"),
            snapshot("container", "active-1", "b"),
            snapshot("image", "c", "a"),
            snapshot("containerd", "active-2", "a"),
            snapshot("snapctl", "active-3", "gone"),
        ]
    }

    #[test]
    fn lines_show_who_stands_on_whom() {
        assert_eq!(
            lines(&forest(), str::to_owned),
            [
                "a (image committed)",
                "|-- b (image committed)",
                "|   `-- active-1 (container active)",
                "`-- c (image committed)",
                "a (containerd committed)",
                "`-- active-2 (containerd active)",
                "active-3 (snapctl active)",
            ]
        );
    }

    #[test]
    fn nested_values_have_the_same_shape() {
        fn shape(nodes: &[Node]) -> String {
            nodes
                .iter()
                .map(|node| format!("{}[{}]", node.snapshot.key, shape(&node.children)))
                .collect()
        }
        assert_eq!(
            shape(&nested(forest())),
            "a[b[active-1[]]c[]]a[active-2[]]active-3[]"
        );
    }
}
