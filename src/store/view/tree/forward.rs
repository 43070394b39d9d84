//! Hard links that a layer lists before what they go to.
//!
//! The link gets a node that stands in for its target. That is a name of the layer like any other: what comes later may
//! replace or remove it, and opaque markers spare it. When all of the layer is applied, each name that still has the node gets
//! the target's instead.

use std::collections::HashMap;

use super::{Body, Fault, Id, Node, ROOT, Tree};
use crate::store::error::Result;
use crate::store::layer::index::{LayerEntry, LayerIndex};

/// The links of one layer.
#[derive(Default)]
pub(super) struct Forward {
    links: Vec<Link>,
    /// Places in `links` by the nodes that stand in.
    by_node: HashMap<Id, usize>,
}

struct Link {
    entry: LayerEntry,
    node: Id,
    /// Directories and names in them that ever had the node.
    names: Vec<(Id, Box<[u8]>)>,
}

impl Forward {
    /// Whether a node stands in for another one.
    pub(super) fn has(&self, node: Id) -> bool {
        self.by_node.contains_key(&node)
    }

    /// The name in a directory has the node, if that stands in for another one.
    pub(super) fn note(&mut self, node: Id, directory: Id, name: &[u8]) {
        let link = self.by_node.get(&node);
        if let Some(link) = link.and_then(|link| self.links.get_mut(*link)) {
            link.names.push((directory, name.into()));
        }
    }
}

impl Tree {
    /// A node that stands in for the target of the hard link `entry`.
    pub(super) fn stand_in(&mut self, entry: &LayerEntry) -> Result<Id, Fault> {
        let node = self.add(Node::unmentioned(libc::S_IFREG as u16, Body::Other))?;
        self.forward.by_node.insert(node, self.forward.links.len());
        self.forward.links.push(Link {
            entry: entry.clone(),
            node,
            names: Vec::new(),
        });
        Ok(node)
    }

    /// Puts the targets of the layer's links in the places of what stands in for them. Fails if one that is left goes to no
    /// file.
    pub(super) fn join_links(&mut self, index: &LayerIndex) -> Result<()> {
        let forward = std::mem::take(&mut self.forward);
        let mut ends = HashMap::new();
        for (number, link) in forward.links.iter().enumerate() {
            let path = index.path(link.entry.path)?;
            for (directory, name) in &link.names {
                if !self
                    .has_still(*directory, name, link.node)
                    .map_err(|fault| fault.at(&path))?
                {
                    continue;
                }
                let end = self.end_of(index, &forward, number, &mut ends)?;
                let directory = self.directory_mut(*directory);
                if let Some(child) = directory.and_then(|found| found.children.get_mut(name)) {
                    child.node = end;
                }
            }
        }
        Ok(())
    }

    /// Whether a name in a directory of the tree has the node.
    fn has_still(&self, directory: Id, name: &[u8], node: Id) -> Result<bool, Fault> {
        let (mut at, mut name, mut node) = (directory, name, node);
        loop {
            self.effort.step(1)?;
            if self.child(at, name).map(|child| child.node) != Some(node) {
                return Ok(false);
            }
            let Some(here) = self.directory(at).filter(|_| at != ROOT) else {
                return Ok(at == ROOT);
            };
            (at, name, node) = (here.above, &here.name, at);
        }
    }

    /// The file that a link leads to, through other links that were listed too early. `ends` has what is known of that.
    fn end_of(
        &self,
        index: &LayerIndex,
        forward: &Forward,
        link: usize,
        ends: &mut HashMap<usize, Id>,
    ) -> Result<Id> {
        let mut passed = Vec::new();
        let mut at = link;
        let end = loop {
            if let Some(end) = ends.get(&at) {
                break *end;
            }
            let entry = &forward.links[at].entry;
            let target = index.target(&entry.inode)?;
            let refuse = |fault: Fault| index.path(entry.path).map(|path| fault.at(&path));
            let found = match self.link_target(target) {
                Ok(Some(found)) => found,
                Ok(None) => return Err(refuse(Fault::to_nothing(target))?),
                Err(fault) => return Err(refuse(fault)?),
            };
            passed.push(at);
            match forward.by_node.get(&found) {
                None => break found,
                Some(_) if passed.len() > forward.links.len() => {
                    return Err(refuse(Fault::in_a_circle(target))?);
                }
                Some(next) => at = *next,
            }
        };
        ends.extend(passed.into_iter().map(|link| (link, end)));
        Ok(end)
    }
}

impl Fault {
    fn to_nothing(target: &[u8]) -> Self {
        Self::of_target(target, "does not exist in this layer or in those below")
    }

    fn in_a_circle(target: &[u8]) -> Self {
        Self::of_target(
            target,
            "does not exist but as a hard link that leads back to it, in a circle",
        )
    }
}
