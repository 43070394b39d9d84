use super::*;
use crate::cow::IdRange;
use crate::fuse::features::Feature;

fn root(options: &str) -> Result<Options, OptionError> {
    parse(&[options], Mounter::Root)
}

fn lowers(options: &str) -> Vec<PathBuf> {
    root(options).unwrap().lowers
}

#[test]
fn directories_and_escapes() {
    assert_eq!(lowers("lowerdir=/a:/b"), [PathBuf::from("/a"), "/b".into()]);
    assert_eq!(
        lowers(r"lowerdir=/a\:b:/c\,d:/e\\f:/g\h"),
        [
            PathBuf::from("/a:b"),
            "/c,d".into(),
            r"/e\f".into(),
            r"/g\h".into()
        ]
    );
    let options = root(r"lowerdir=/l,upperdir=/u\:\,1,workdir=/w").unwrap();
    assert_eq!(options.upper, Some("/u:,1".into()));
    assert_eq!(options.work, Some("/w".into()));
    assert!(!options.mount.read_only);
}

#[test]
fn a_name_need_not_be_utf8() {
    let options = parse(&[OsStr::from_bytes(b"lowerdir=/\xff")], Mounter::Root).unwrap();
    assert_eq!(options.lowers[0].as_os_str().as_bytes(), b"/\xff");
}

#[test]
fn the_last_word_counts_and_empty_ones_do_not() {
    let options = parse(
        &["", "lowerdir=/a,,ro,threads=3,", "lowerdir=/b,threads=4"],
        Mounter::Root,
    );
    let options = options.unwrap();
    assert_eq!(options.lowers, [PathBuf::from("/b")]);
    assert_eq!(options.session.threads, 4);
    assert!(options.mount.read_only);
}

#[test]
fn defaults_depend_on_who_mounts() {
    let mine = parse(&["lowerdir=/a"], Mounter::Root).unwrap().mount;
    assert!(mine.allow_other && !mine.nosuid && !mine.nodev);
    let theirs = parse(&["lowerdir=/a"], Mounter::User).unwrap();
    assert!(!theirs.mount.allow_other && theirs.mount.nosuid && theirs.mount.nodev);
    assert_eq!(
        theirs.union_config(Vec::new()).xattr_family,
        XattrFamily::User
    );
}

#[test]
fn the_root_of_a_user_namespace_gets_marks_that_it_can_set() {
    let options = parse(&["lowerdir=/a"], Mounter::NamespaceRoot).unwrap();
    assert!(options.user_xattr && options.mount.allow_other && !options.mount.nodev);
    assert!(options.union_config(Vec::new()).no_metacopy);
    let asked = parse(&["lowerdir=/a,metacopy=on"], Mounter::NamespaceRoot).unwrap();
    assert!(!asked.union_config(Vec::new()).no_metacopy);
}

#[test]
fn mappings_are_triples_with_colons_or_commas_between() {
    let range = |host, shown, length| IdRange {
        host,
        shown,
        length,
    };
    let options = "lowerdir=/a,uidmapping=0:1000:1:1:110000:65536,gidmapping=0:5:1,1:9:2,ro";
    let owners = root(options).unwrap().owners;
    let users = [range(0, 1000, 1), range(1, 110_000, 65_536)];
    assert_eq!(owners.users.ranges, users);
    assert_eq!(owners.groups.ranges, [range(0, 5, 1), range(1, 9, 2)]);
    for bad in [
        "0:1",
        "",
        "0:0:0",
        "a:b:c",
        "0:1:2:3",
        "0:0:4294967296",
        "9:4294967295:1",
    ] {
        let error = root(&format!("lowerdir=/a,uidmapping={bad}")).unwrap_err();
        assert!(matches!(error, OptionError::BadValue { .. }), "{bad}");
    }
}

/// As the kernel refuses them in /proc/PID/uid_map: an id would have two meanings.
#[test]
fn ranges_of_a_mapping_do_not_overlap() {
    for bad in [
        "0:10:5:3:20:5",
        "0:10:5,3:20:5",
        "3:20:5:0:10:5",
        "0:10:5:7:14:5",
        "7:14:5:0:10:5",
        "0:10:5:1:11:1",
        "0:10:1:0:10:1",
    ] {
        for name in ["uidmapping", "gidmapping"] {
            let error = root(&format!("lowerdir=/a,{name}={bad}")).unwrap_err();
            assert!(error.to_string().contains("one range only"), "{error}");
        }
    }
    let beside = "lowerdir=/a,uidmapping=0:10:5:5:20:5:10:15:5,gidmapping=0:10:5";
    assert_eq!(root(beside).unwrap().owners.users.ranges.len(), 3);
    // Of an option given twice the last one counts.
    let twice = "lowerdir=/a,uidmapping=0:10:5,uidmapping=3:20:5";
    assert_eq!(root(twice).unwrap().owners.users.ranges.len(), 1);
}

#[test]
fn one_user_goes_before_root_when_squashing() {
    let squashed = |text: &str| {
        let owners = root(&format!("lowerdir=/a,{text}")).unwrap().owners;
        (owners.users.squash, owners.groups.squash)
    };
    assert_eq!(squashed("squash_to_root"), (Some(0), Some(0)));
    assert_eq!(
        squashed("squash_to_uid=7,squash_to_root"),
        (Some(7), Some(0))
    );
    assert_eq!(squashed("squash_to_gid=8"), (None, Some(8)));
}

#[test]
fn fuse_overlayfs_words_mean_what_its_users_expect() {
    let options = root("lowerdir=/a,fsync=0,threaded=0,writeback=1,noxattrs=1,debug").unwrap();
    assert!(options.volatile && options.no_xattrs && options.debug);
    assert!(options.session.writeback && options.session.threads == 1);
    let options = root("lowerdir=/a,xattr_permissions=2,static_nlink,allow_root").unwrap();
    assert_eq!(options.stat_override, Some(StatOverride::User));
    assert!(options.static_nlink && options.session.root_and_owner);
    let error = root("lowerdir=/a,plugins=/p.so").unwrap_err();
    assert!(matches!(
        error,
        OptionError::Refused {
            name: "plugins",
            ..
        }
    ));
    assert!(error.to_string().contains("lowerdir"), "{error}");
}

#[test]
fn the_last_word_on_a_way_to_serve_counts() {
    let session = root("lowerdir=/a,passthrough").unwrap().session;
    assert!(session.passthrough);
    let options = root("lowerdir=/a,passthrough,writeback,no_passthrough").unwrap();
    assert!(options.session.writeback && !options.session.passthrough);
}

#[test]
fn a_quoted_context_may_hold_commas() {
    let options = root("lowerdir=/a,context=\"u:r:t:s0:c1,c2\",noexec").unwrap();
    assert_eq!(options.mount.extra, ["context=\"u:r:t:s0:c1,c2\""]);
    assert!(options.mount.noexec);
}

#[test]
fn without_an_upper_a_mount_is_read_only() {
    assert!(root("lowerdir=/a,rw").unwrap().mount.read_only);
    let options = root("lowerdir=/a,upperdir=/u,ro").unwrap();
    let config = options.union_config(Vec::new());
    assert!(config.upper.is_none());
    assert_eq!(config.lowers, [PathBuf::from("/u"), "/a".into()]);
}

#[test]
fn features_are_masked_one_by_one_or_all() {
    let allowed = |text: &str| root(text).unwrap().session.allowed;
    let some = allowed("lowerdir=/a,kernel_features=-writeback,-readdirplus,ro");
    assert!(!some.contains(Feature::Writeback));
    assert!(!some.contains(Feature::Readdirplus));
    assert!(some.contains(Feature::PosixAcl));
    let one = allowed("kernel_features=-all:+async_dio,lowerdir=/a");
    assert!(one.contains(Feature::AsyncDio) && !one.contains(Feature::Writeback));
    // What programs would miss.
    assert!(one.contains(Feature::PosixAcl) && one.contains(Feature::DontMask));
    assert!(one.contains(Feature::Rename2) && !one.contains(Feature::CacheDir));
    let old = allowed("lowerdir=/a,kernel_features=7.22,-readdirplus");
    assert!(old.contains(Feature::AsyncDio) && !old.contains(Feature::Readdirplus));
    assert!(!old.contains(Feature::Rename2) && !old.contains(Feature::Lseek));
    assert!(matches!(
        root("lowerdir=/a,kernel_features=-nonsense"),
        Err(OptionError::BadValue { .. })
    ));
    assert!(matches!(
        root("lowerdir=/a,ro,-writeback"),
        Err(OptionError::Unknown(_))
    ));
}

#[test]
fn each_mistake_has_its_own_error() {
    let cases = [
        (
            "lowerdir=/a,frobnicate",
            OptionError::Unknown("frobnicate".into()),
        ),
        ("lowerdir=/a,frob=1", OptionError::Unknown("frob=1".into())),
        ("lowerdir=/a,ro=1", OptionError::Unknown("ro=1".into())),
        ("lowerdir", OptionError::NeedsValue("lowerdir")),
        ("lowerdir=/a,upperdir=", OptionError::NeedsValue("upperdir")),
        ("lowerdir=/a::/b", OptionError::EmptyLower),
        ("ro", OptionError::NoLower),
        ("lowerdir=/a,upperdir=/u", OptionError::UpperWithoutWork),
        ("lowerdir=/a,workdir=/w", OptionError::WorkWithoutUpper),
        (
            "lowerdir=/a,passthrough,writeback",
            OptionError::NotWithPassthrough("writeback"),
        ),
        (
            "lowerdir=/a,no_open,passthrough",
            OptionError::NotWithPassthrough("no_open"),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(root(text).unwrap_err(), expected, "{text}");
    }
    for text in [
        "xino=maybe",
        "threads=0",
        "threads=65",
        "metacopy=yes",
        "fsync=2",
        "timeout=soon",
        "max_write=1",
        "xattr_permissions=3",
        "squash_to_uid=4294967295",
    ] {
        let error = root(&format!("lowerdir=/a,{text}")).unwrap_err();
        assert!(
            matches!(error, OptionError::BadValue { .. }),
            "{text}: {error}"
        );
    }
}

#[test]
fn what_other_mount_programs_are_given_is_taken() {
    root("lowerdir=/a,x-systemd.automount,_netdev,relatime,metacopy=on,index=off,redirect_dir=on,default_permissions,context=\"a\"").unwrap();
    root("lowerdir=/a,timeout=0.0,clone_fd,fast_ino=1,max_threads=10,max_idle_threads=-1,auto_unmount,max_write=65536").unwrap();
}

#[test]
fn a_file_of_lowers_has_one_a_line() {
    assert_eq!(
        parse_lowerdir_file(b"/a\n\n/b:c\n"),
        [PathBuf::from("/a"), "/b:c".into()]
    );
}
