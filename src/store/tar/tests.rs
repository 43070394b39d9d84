use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;

/// Bytes of the stream in order; content is marked by the caller.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Tape for Bytes {
    fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// All entries with their content. What comes off the tape is compared with the stream.
pub(super) fn read_all(stream: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>> {
    let mut reader = Reader::new(stream, Bytes::default());
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut content = Vec::new();
        let mut buffer = [0; 700];
        loop {
            let count = reader.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            content.extend_from_slice(&buffer[..count]);
        }
        reader.tape().raw(&content)?;
        entries.push((entry, content));
    }
    assert_eq!(reader.finish()?.0, stream);
    Ok(entries)
}

/// What GNU tar makes of `dir` with these arguments.
fn gnu_tar(dir: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--create", "--file=-", "--sort=name", "--numeric-owner"])
        .args(arguments)
        .arg("--directory")
        .arg(dir)
        .arg(".")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

pub(super) fn find<'a>(entries: &'a [(Entry, Vec<u8>)], path: &str) -> &'a (Entry, Vec<u8>) {
    let found = entries
        .iter()
        .find(|(entry, _)| entry.path == path.as_bytes());
    found.unwrap_or_else(|| panic!("there is no {path}"))
}

#[test]
fn every_form_that_gnu_tar_writes_says_the_same() {
    use std::os::unix::fs::{FileExt, MetadataExt, symlink};
    let tmp = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(150));
    fs::create_dir(tmp.path().join("d".repeat(120))).unwrap();
    fs::write(tmp.path().join(&long), b"long").unwrap();
    symlink(&long, tmp.path().join("link")).unwrap();
    fs::hard_link(tmp.path().join(&long), tmp.path().join("zz-hard")).unwrap();
    let sparse = fs::File::create(tmp.path().join("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    for at in 0..30u64 {
        sparse
            .write_all_at(&[at as u8 + 1; 4096], at << 20)
            .unwrap();
    }
    let hole = fs::File::create(tmp.path().join("hole")).unwrap();
    hole.set_len(1 << 20).unwrap();
    let fifo = Command::new("mkfifo").arg(tmp.path().join("fifo")).status();
    assert!(fifo.unwrap().success());
    xattr::set(tmp.path().join(&long), "user.name", b"v\0lue").unwrap();
    let meta = fs::metadata(tmp.path().join("sparse")).unwrap();

    for arguments in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &[
            "--format=pax",
            "--xattrs",
            "--sparse",
            "--sparse-version=0.0",
        ],
        &[
            "--format=pax",
            "--xattrs",
            "--sparse",
            "--sparse-version=0.1",
        ],
        &[
            "--format=pax",
            "--xattrs",
            "--sparse",
            "--sparse-version=1.0",
        ],
    ] {
        let entries = read_all(&gnu_tar(tmp.path(), arguments)).unwrap();
        let pax = arguments.contains(&"--format=pax");
        let (entry, content) = find(&entries, &format!("./{long}"));
        assert_eq!(
            (entry.kind, content.as_slice()),
            (Kind::Regular, &b"long"[..])
        );
        let xattrs = [(b"user.name".to_vec(), b"v\0lue".to_vec())];
        assert_eq!(entry.xattrs, if pax { &xattrs[..] } else { &[] });
        let (link, _) = find(&entries, "./link");
        assert_eq!(
            (link.kind, &link.link),
            (Kind::Symlink, &long.clone().into_bytes())
        );
        let (hard, _) = find(&entries, "./zz-hard");
        assert_eq!(hard.kind, Kind::HardLink);
        assert_eq!(hard.link, format!("./{long}").into_bytes());
        assert_eq!(find(&entries, "./fifo").0.kind, Kind::Fifo);
        let (entry, content) = find(&entries, "./sparse");
        assert_eq!(entry.size, 50 << 20, "{arguments:?}");
        assert_eq!(entry.mtime.sec, meta.mtime());
        assert_eq!(
            entry.mtime.nsec,
            if pax { meta.mtime_nsec() as u32 } else { 0 }
        );
        let mut file = vec![0; 50 << 20];
        match &entry.parts {
            None => file.copy_from_slice(content),
            Some(parts) => {
                assert!(content.len() < 1 << 20);
                let mut at = 0;
                for part in parts {
                    let to = at + part.length as usize;
                    file[part.offset as usize..][..part.length as usize]
                        .copy_from_slice(&content[at..to]);
                    at = to;
                }
            }
        }
        assert!(
            file == fs::read(tmp.path().join("sparse")).unwrap(),
            "{arguments:?}"
        );
        let (hole, content) = find(&entries, "./hole");
        assert_eq!(hole.size, 1 << 20);
        if arguments.contains(&"--sparse") {
            assert_eq!((hole.parts.as_deref(), content.len()), (Some(&[][..]), 0));
        }
    }
}

/// A stream with one entry, whose header `change` may change.
fn one(content: &[u8], change: impl Fn(&mut tar::Header)) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("name").unwrap();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    change(&mut header);
    header.set_cksum();
    let mut stream = header.as_bytes().to_vec();
    stream.extend_from_slice(content);
    stream.resize(stream.len().next_multiple_of(BLOCK), 0);
    stream
}

/// A PAX header with these records, and then an empty file.
fn with_pax(records: &[u8]) -> Vec<u8> {
    let mut stream = one(records, |header| {
        header.set_entry_type(tar::EntryType::XHeader)
    });
    stream.extend(one(b"", |_| {}));
    stream.resize(stream.len() + 1024, 0);
    stream
}

fn problem(stream: &[u8]) -> String {
    read_all(stream).unwrap_err().to_string()
}

#[test]
fn what_cannot_be_is_refused_by_the_entrys_name() {
    let huge = one(b"", |header| {
        header.set_size(2 << 20);
        header.set_entry_type(tar::EntryType::XHeader);
    });
    assert!(problem(&huge).contains("more than 1 MiB"));
    let unknown = one(b"", |header| {
        header.set_entry_type(tar::EntryType::new(b'M'))
    });
    assert!(problem(&unknown).contains("name: its type 'M' is not known"));
    assert!(problem(&one(b"", |header| header.set_uid(u64::from(u32::MAX)))).contains("no user"));
    assert!(problem(&one(b"", |header| header.set_size(1 << 40))).contains("within its content"));
    assert!(problem(&with_pax(b"10 path=a\0\n")).contains("is damaged"));
    assert!(problem(&with_pax(b"11 path=a\0b\n")).contains("is damaged"));
    assert!(problem(&with_pax(b"12 path=a\0b\n")).contains("zero byte"));
    assert!(problem(&with_pax(b"13 size=1e99\n")).contains("its size"));
    let mut bad = one(b"", |_| {});
    bad[0] ^= 1;
    assert!(problem(&bad).contains("checksum"));
    let mut many = Vec::new();
    for _ in 0..100 {
        many.extend(one(b"x", |header| {
            header.set_entry_type(tar::EntryType::GNULongName)
        }));
    }
    assert!(problem(&many).contains("too many extended headers"));
}

#[test]
fn maps_of_sparse_files_that_cannot_be_are_refused() {
    let map = |text: &str| {
        let records = [
            ("GNU.sparse.size", "100".to_owned()),
            ("GNU.sparse.map", text.to_owned()),
        ];
        let mut bytes = Vec::new();
        for (key, value) in records {
            // The length counts its own two digits.
            let length = key.len() + value.len() + 5;
            bytes.extend(format!("{length} {key}={value}\n").bytes());
        }
        read_all(&with_pax(&bytes)).map(|entries| entries[0].0.parts.clone())
    };
    assert_eq!(map("100,0").unwrap(), Some(vec![]));
    for bad in [
        "0,1",
        "101,0",
        "5,0,4,0",
        "0",
        "x,0",
        "-1,0",
        "9223372036854775807,1",
    ] {
        assert!(map(bad).is_err(), "{bad}");
    }
    let wrong = |major: &str| format!("22 GNU.sparse.major={major}\n22 GNU.sparse.minor=0\n");
    assert!(problem(&with_pax(wrong("2").as_bytes())).contains("form"));
    assert!(problem(&with_pax(wrong("1").as_bytes())).contains("map"));
}

#[test]
fn a_record_that_is_empty_leaves_what_the_header_says() {
    let entries = read_all(&with_pax(b"8 path=\n7 uid=\n")).unwrap();
    assert_eq!(entries[0].0.path, b"name");
    assert_eq!(entries[0].0.uid, 0);
}

/// Such an entry was taken for one of the root, and lost.
#[test]
fn a_long_name_that_is_empty_leaves_what_the_header_says() {
    for long in [&b""[..], b"\0", b"\0after"] {
        let mut stream = Vec::new();
        for kind in [tar::EntryType::GNULongName, tar::EntryType::GNULongLink] {
            stream.extend(one(long, |header| header.set_entry_type(kind)));
        }
        stream.extend(one(b"", |header| {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_link_name("target").unwrap();
        }));
        let (entry, _) = read_all(&stream).unwrap().remove(0);
        assert_eq!(entry.path, b"name");
        assert_eq!(entry.link, b"target");
    }
}

#[test]
fn streams_without_padding_or_trailer_are_read_and_those_cut_off_are_not() {
    let whole = one(&[7; 100], |_| {});
    for end in [512 + 100, 512 + 300, whole.len()] {
        assert_eq!(read_all(&whole[..end]).unwrap()[0].1, [7; 100]);
    }
    for end in [1, 511, 512, 512 + 99] {
        assert!(read_all(&whole[..end]).is_err(), "cut at {end}");
    }
    assert!(read_all(b"").unwrap().is_empty());
    let mut followed = vec![0; 512];
    followed.extend(&whole);
    assert!(problem(&followed).contains("followed by more"));
    let garbage = [whole, vec![0; 1024], b"garbage".to_vec()].concat();
    assert_eq!(read_all(&garbage).unwrap().len(), 1);
}

#[test]
fn no_byte_of_a_header_makes_it_panic() {
    let mut stream = one(b"21 SCHILY.xattr.a.b=c\n", |header| {
        header.set_entry_type(tar::EntryType::XHeader);
    });
    stream.extend(one(b"content", |_| {}));
    stream.resize(stream.len() + 1024, 0);
    for at in 0..stream.len() {
        for value in [0, b'0', b'9', 0x7f, 0x80, 0xff] {
            let mut bad = stream.clone();
            bad[at] = value;
            for start in [0, 1024] {
                let sum: u32 = bad[start..start + 512]
                    .iter()
                    .enumerate()
                    .map(|(at, &byte)| {
                        if (148..156).contains(&at) {
                            32
                        } else {
                            u32::from(byte)
                        }
                    })
                    .sum();
                let text = format!("{sum:06o}\0 ");
                bad[start + 148..start + 156].copy_from_slice(text.as_bytes());
            }
            // Whatever it is taken for, it comes to an end, and nothing of the stream is lost.
            let _ = read_all(&bad);
        }
    }
}
