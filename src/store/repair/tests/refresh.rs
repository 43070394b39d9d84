//! Views that are told that the store was mended.

use super::*;

/// Damages one of the files in a pack, and a large one.
fn damage(store: &Store) {
    flip(&store.file("packs"), 64 + 64 + 500);
    flip(&store.file("objects"), 500);
}

/// Files that are not read as they were.
fn wrong(view: &View) -> Vec<&'static str> {
    let is_wrong = |name: &&str| read(view, name).unwrap() != content(name);
    FILES.into_iter().filter(is_wrong).collect()
}

/// What it had found out about contents before, and what it had open of packs, it went on with.
#[test]
fn a_view_reads_what_was_mended_in_place_of_what_it_has_open() {
    for verify in [Verify::Never, Verify::First] {
        let store = Store::new();
        let view = view_of(&store, verify);
        assert_eq!(wrong(&view).len(), 0);
        damage(&store);
        assert_eq!(wrong(&view).len(), 2, "{verify:?}");
        store.restore();
        // Large files are opened anew each time, here; the pack is open.
        let wrong_of_pack = wrong(&view);
        assert!(
            wrong_of_pack == ["a"] || wrong_of_pack == ["b"],
            "{verify:?}: {wrong_of_pack:?}"
        );
        view.refresh();
        assert_eq!(wrong(&view).len(), 0, "{verify:?}");
        drop(view);
        store.assert_whole();
    }
}

#[test]
fn a_view_compares_once_more_what_it_has_compared_before() {
    let store = Store::new();
    let view = view_of(&store, Verify::First);
    assert_eq!(wrong(&view).len(), 0);
    damage(&store);
    view.refresh();
    let failed = FILES.into_iter().filter(|name| read(&view, name).is_err());
    assert_eq!(failed.count(), 2);
}

#[test]
fn what_only_a_view_has_of_a_pack_it_reads_on() {
    let store = Store::new();
    let view = view_of(&store, Verify::First);
    assert_eq!(wrong(&view).len(), 0);
    fs::remove_file(store.file("packs")).unwrap();
    for _ in 0..2 {
        view.refresh();
        assert_eq!(wrong(&view).len(), 0);
    }
}
