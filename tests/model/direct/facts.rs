//! What there is to see of an object.

use super::*;

impl Direct {
    pub(super) fn content(&self, node: NodeId, attr: Attr) -> Result<Vec<u8>> {
        let handle = self.union().open_file(node, libc::O_RDONLY, &CALLER)?;
        // One byte more than there should be, to see what lies behind the end.
        let data = self.read(
            node,
            Some(&handle),
            0,
            usize::try_from(attr.size).unwrap() + 1,
        );
        self.union().release(node, handle);
        data
    }

    pub(super) fn list(&self, node: NodeId) -> Result<BTreeMap<String, (Kind, u64)>> {
        let handle = self.union().open_dir(node)?;
        let mut found = BTreeMap::new();
        let mut offset = 0;
        loop {
            // Seven entries at a time, so that reading goes on from an offset.
            let mut left = 7;
            self.union().read_dir(node, &handle, offset, &mut |entry| {
                if left == 0 {
                    return false;
                }
                left -= 1;
                offset = entry.next_offset;
                let name = entry.name.to_string_lossy().into_owned();
                if name != "." && name != ".." {
                    let again = found.insert(name.clone(), (kind_of(entry.kind), entry.ino));
                    assert!(again.is_none(), "{name} is listed twice");
                }
                true
            })?;
            if left == 7 {
                return Ok(found);
            }
        }
    }

    pub(super) fn xattrs(&self, node: NodeId) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut found = BTreeMap::new();
        for name in self.union().listxattr(node)? {
            let value = self.union().getxattr(node, &name)?;
            found.insert(name.to_string_lossy().into_owned(), value);
        }
        found.remove("security.selinux");
        Ok(found)
    }

    pub(super) fn item(&self, node: NodeId) -> Result<Item> {
        let attr = self.union().getattr(node, None)?;
        let data = match attr.kind {
            FileKind::Regular => self.content(node, attr)?,
            FileKind::Symlink => self.union().readlink(node)?.into_encoded_bytes(),
            _ => Vec::new(),
        };
        Ok(Item {
            facts: facts(&attr),
            data,
            xattrs: self.xattrs(node)?,
            ino: attr.ino,
        })
    }
}
