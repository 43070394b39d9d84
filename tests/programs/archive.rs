//! tar, cp and rsync: everything that a tree has goes through the mount and comes back the same.

use crate::Ground;
use crate::mounts::mode::Mode;

/// A tree with everything that archivers know.
const TREE: &str = "mkdir -p tree/a/b tree/empty
     head -c 300000 /dev/urandom > tree/a/data; truncate -s 5M tree/sparse
     printf tail | dd of=tree/sparse bs=1 seek=4000000 conv=notrunc status=none
     ln tree/a/data tree/hard; ln -s a/b tree/soft; mkfifo tree/fifo; mknod tree/null c 1 3
     chown -h 1000:1001 tree/soft tree/a/b; chmod 2770 tree/a; chmod 4755 tree/hard; setfattr -n user.k -v v tree/a/data
     $SETFACL -m u:1234:rw tree/a/data; $SETFACL -d -m g:77:rx tree/a/b
     find tree -depth -exec touch -h -d '2001-02-03 04:05:06.123456789' {} +";

/// Every attribute of a tree below the working directory, as text.
const DESCRIBE: &str = "(cd tree
     find . -printf '%p %y %m %U:%G %T@ %l ' \\( -type d -printf '\\n' -o -printf '%s %n\\n' \\) | sort
     find . -type f -print0 | sort -z | xargs -0 md5sum
     getfacl -RPn . 2>/dev/null; getfattr -Rhd . 2>/dev/null)";

#[test]
fn a_tree_comes_through_tar_cp_and_rsync_as_it_was() {
    // Where the kernel would not enforce an access control list, the mount shows none.
    let setfacl = match Mode::of_run().is_new() {
        true => "setfacl",
        false => ":",
    };
    let mut ground = Ground::new(&format!("SETFACL={setfacl}; {TREE}"));
    let outside = ground.outside("outside");
    let want = crate::sh(&ground.dirs.lowers[0].clone(), DESCRIBE);
    assert_eq!(ground.sh(DESCRIBE), want, "the lower through the mount");
    // Out of the mount, into the mount, and inside of it.
    let copies = [
        "tar -c --acls --xattrs --xattrs-include='*' -f - tree | tar -x --acls --xattrs --xattrs-include='*' -p -C",
        "cp -a --sparse=auto tree",
        "cp -a --reflink=auto --sparse=always tree",
        "rsync -aHAX --devices --specials --inplace tree",
        "rsync -aHAXS --devices --specials tree",
        "rsync -aHAX --checksum --devices --specials tree",
    ];
    // Tells what differs and copies nothing; contents are compared, too.
    const COMPARE: &str = "rsync -aHAXni --checksum --delete --devices --specials";
    for (number, copy) in copies.iter().enumerate() {
        let (out, inside) = (
            outside.join(number.to_string()),
            ground.root().join(format!("in{number}")),
        );
        for to in [&out, &inside] {
            std::fs::create_dir(to).unwrap();
        }
        ground.sh(&format!("{copy} {}/", out.display()));
        assert_eq!(
            crate::sh(&out, DESCRIBE),
            want,
            "out of the mount by {copy}"
        );
        crate::sh(&out, &format!("{copy} {}/", inside.display()));
        assert_eq!(
            crate::sh(&inside, DESCRIBE),
            want,
            "into the mount by {copy}"
        );
        let differs = ground.sh(&format!(
            "{COMPARE} tree {out}/; {COMPARE} {out}/tree .; {COMPARE} {out}/tree in{number}/; {COMPARE} in{number}/tree {out}/",
            out = out.display()
        ));
        assert_eq!(differs, "", "as rsync sees the copies by {copy}");
    }
    ground.remount();
    for number in 0..copies.len() {
        let inside = ground.root().join(format!("in{number}"));
        assert_eq!(crate::sh(&inside, DESCRIBE), want, "after a remount");
    }
    ground.sh("rm -r tree in*; test -z \"$(ls -A)\"");
    ground.finish();
}

#[test]
fn a_copy_up_keeps_holes() {
    let ground = Ground::new(
        "truncate -s 200M sparse; printf x | dd of=sparse bs=1 seek=100000000 conv=notrunc status=none",
    );
    ground.sh("printf y | dd of=sparse bs=1 seek=5 conv=notrunc status=none");
    let blocks: u64 = ground.sh("stat -c %b sparse").trim().parse().unwrap();
    assert!(
        blocks < 1000,
        "{blocks} units of 512 bytes are allotted to two pages of data"
    );
    assert_eq!(ground.sh("dd if=sparse bs=1 skip=100000000 count=1 status=none; dd if=sparse bs=1 skip=5 count=1 status=none; stat -c ' %s' sparse"), "xy 209715200\n");
    ground.finish();
}
