use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Fruit {
    name: String,
    weight: u64,
}

impl Record for Fruit {
    const KIND: &'static str = "fruit";
    const VERSION: u32 = 2;
}

fn fruit(name: &str) -> Fruit {
    Fruit {
        name: name.to_owned(),
        weight: 7,
    }
}

fn problem(bytes: &[u8]) -> String {
    decode::<Fruit>(bytes).unwrap_err().to_string()
}

#[test]
fn a_record_comes_back_as_it_was_put() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(&tmp.path().join("a/b")).unwrap();
    assert_eq!(dir.get("x").unwrap(), None::<Fruit>);
    dir.put("x", &fruit("line\nbreak \u{2028} \"quote\""))
        .unwrap();
    dir.put("y", &fruit("pear")).unwrap();
    dir.put("y", &fruit("plum")).unwrap();
    let dir = RecordDir::<Fruit>::open(&tmp.path().join("a/b")).unwrap();
    assert_eq!(
        dir.get("x").unwrap().unwrap().name,
        "line\nbreak \u{2028} \"quote\""
    );
    let listing = dir.list().unwrap();
    assert_eq!(listing.records[1], ("y".to_owned(), fruit("plum")));
    assert_eq!(listing.records.len(), 2);
    assert!(listing.damaged.is_empty());
    assert!(dir.remove("x").unwrap());
    assert!(!dir.remove("x").unwrap());
    assert_eq!(dir.list().unwrap().records.len(), 1);
}

#[test]
fn every_flipped_or_missing_byte_is_noticed() {
    let good = encode(&fruit("apple")).unwrap();
    assert_eq!(decode::<Fruit>(&good).unwrap(), fruit("apple"));
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        assert!(decode::<Fruit>(&bad).is_err(), "byte {at} flipped");
        assert!(decode::<Fruit>(&good[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn foreign_kinds_and_newer_versions_are_refused() {
    let sealed = |header: &str| {
        let mut bytes =
            format!("{MAGIC}\n{header}\n{{\"name\":\"a\",\"weight\":1}}\n").into_bytes();
        let sum = blake3::hash(&bytes).to_hex();
        bytes.extend_from_slice(sum.as_bytes());
        bytes.push(b'\n');
        bytes
    };
    let header = |kind: &str, version: u32, compatible: u64, incompatible: u64| {
        sealed(&format!(
            "{{\"kind\":\"{kind}\",\"version\":{version},\"compatible\":{compatible},\"read_only_compatible\":0,\"incompatible\":{incompatible}}}"
        ))
    };
    assert!(decode::<Fruit>(&header("fruit", 1, 4, 0)).is_ok());
    assert!(problem(&header("fish", 1, 0, 0)).contains("record of a fish"));
    assert!(problem(&header("fruit", 3, 0, 0)).contains("newer release"));
    assert!(problem(&header("fruit", 2, 0, 1)).contains("newer release"));
}

#[test]
fn a_damaged_record_is_named_and_takes_no_other_with_it() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(tmp.path()).unwrap();
    dir.put("good", &fruit("apple")).unwrap();
    dir.put("bad", &fruit("pear")).unwrap();
    fs::write(tmp.path().join("bad.record"), b"").unwrap();
    fs::create_dir(tmp.path().join("worse.record")).unwrap();
    fs::write(tmp.path().join(".tmp-3"), b"half").unwrap();
    let dir = RecordDir::<Fruit>::open(tmp.path()).unwrap();
    let listing = dir.list().unwrap();
    assert_eq!(listing.records, [("good".to_owned(), fruit("apple"))]);
    let ids: Vec<_> = listing.damaged.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, ["bad", "worse"]);
    assert!(listing.damaged[0].to_string().contains("delete the file"));
    assert!(tmp.path().join("bad.record").exists());
    assert!(!tmp.path().join(".tmp-3").exists());
}

#[test]
fn what_is_damaged_or_gone_is_found_and_what_is_replaced_or_removed_is_not() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(tmp.path()).unwrap();
    let known = || ["bad", "gone", "good"].map(str::to_owned);
    for id in known() {
        dir.put(&id, &fruit(&id)).unwrap();
    }
    assert!(dir.examine(known()).unwrap().is_empty());
    fs::remove_file(tmp.path().join("gone.record")).unwrap();
    fs::write(tmp.path().join("bad.record"), b"").unwrap();
    let damaged = dir.examine(known()).unwrap();
    let told: Vec<_> = damaged.iter().map(|damaged| damaged.fact()).collect();
    let path = |name: &str| tmp.path().join(name).display().to_string();
    let bad = path("bad.record");
    let gone = path("gone.record");
    assert_eq!(
        told,
        [
            format!("the record {bad} cannot be used: it is empty or cut off"),
            format!("the record {gone} cannot be used: it is gone"),
        ]
    );
    assert!(dir.is_unsound("bad", false) && dir.is_unsound("gone", true));
    // Removed in order.
    assert!(!dir.is_unsound("gone", false));
    dir.put("bad", &fruit("apple")).unwrap();
    assert!(!dir.is_unsound("bad", true));

    // At any moment there is the old one or the new one, and none that is half written.
    let writing = std::sync::atomic::AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..100 {
                dir.put("good", &fruit(&"x".repeat(round * 100))).unwrap();
                dir.put("other", &fruit("pear")).unwrap();
                dir.remove("other").unwrap();
            }
            writing.store(false, Ordering::Release);
        });
        while writing.load(Ordering::Acquire) {
            let damaged = dir.examine(["good".to_owned()]).unwrap();
            assert!(damaged.is_empty(), "{damaged:?}");
        }
    });
    // To look into what another process writes clears nothing away.
    fs::write(tmp.path().join(".tmp-3"), b"half").unwrap();
    let other = RecordDir::<Fruit>::of_another(tmp.path());
    assert_eq!(other.get("good").unwrap().unwrap().name.len(), 9900);
    assert!(tmp.path().join(".tmp-3").exists());
}

#[test]
fn an_id_is_never_a_path() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RecordDir::<Fruit>::open(tmp.path()).unwrap();
    for id in [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "a b",
        "\u{e9}",
        &"x".repeat(201),
    ] {
        assert!(
            matches!(dir.put(id, &fruit("apple")), Err(Error::BadId { .. })),
            "{id:?}"
        );
    }
}

/// What a newer release had written was lost.
#[test]
fn a_record_of_a_newer_release_is_not_replaced() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(tmp.path()).unwrap();
    dir.put("x", &fruit("apple")).unwrap();
    let path = tmp.path().join("x.record");
    let text = fs::read_to_string(&path).unwrap();
    let (body, _) = text.trim_end().rsplit_once('\n').unwrap();
    let newer = |body: &str| format!("{body}{}\n", blake3::hash(body.as_bytes()).to_hex());
    let newer = newer(&format!("{body}\n").replace("\"version\":2", "\"version\":3"));
    fs::write(&path, &newer).unwrap();
    let refused = dir.put("x", &fruit("pear")).unwrap_err();
    let told = "a newer release of Plywood wrote it; have the newer release repair it";
    assert!(refused.to_string().ends_with(told), "{refused}");
    assert_eq!(fs::read_to_string(&path).unwrap(), newer);
    // What is damaged is.
    fs::write(&path, b"").unwrap();
    dir.put("x", &fruit("pear")).unwrap();
    assert_eq!(dir.get("x").unwrap(), Some(fruit("pear")));
}

#[test]
fn a_change_makes_a_record_doubtful_and_what_was_sound_is_not_read_again() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(tmp.path()).unwrap();
    let path = tmp.path().join("x.record");
    let doubtful = || dir.is_doubtful(["x".to_owned()]).unwrap();
    assert!(doubtful(), "it is not there");
    dir.put("x", &fruit("plum")).unwrap();
    assert!(!doubtful());
    // Too young for its times to tell it from what is written next.
    assert!(dir.sound.lock().is_empty());
    let seen = || Stamp::of(&fs::metadata(&path).unwrap());
    let note = || dir.sound.lock().insert("x".to_owned(), seen());
    let later = SystemTime::now() + 3 * SETTLED;
    assert!(seen().is_settled(later) && !seen().is_settled(SystemTime::now()));
    note();
    assert!(!doubtful());
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[1..]).unwrap();
    assert!(doubtful());
    // Had it been like that when it was found sound, nobody would look into it.
    note();
    assert!(!doubtful());
    fs::write(&path, good).unwrap();
    assert!(!doubtful());
    assert!(dir.remove("x").unwrap());
    assert!(doubtful());
    assert!(!dir.is_doubtful([]).unwrap());
}
