//! Hard links that come before what they go to.

use super::*;

/// Each name with the number of its inode's names.
fn links(view: &View, names: &[&str]) -> Vec<u32> {
    names.iter().map(|name| at(view, name).1.links).collect()
}

fn refused(fixture: &Fixture, streams: Vec<Stream>) -> String {
    fixture.try_view(streams).unwrap_err().to_string()
}

#[test]
fn a_link_may_come_before_its_target() {
    let fixture = Fixture::new();
    let view = fixture.view(vec![
        Stream::new().file("old", "below").file("d/hidden", "below"),
        // Some through a link, in a chain, and in the place of what was there.
        Stream::new()
            .link("l", "d")
            .hard("old", "c")
            .hard("d/b", "c")
            .hard("l/a", "d/b")
            .hard("a2", "d/b")
            .file("d/.wh..wh..opq", "")
            .file("c", "content"),
    ]);
    assert_eq!(
        tree(&view),
        [
            "/a2 = content",
            "/c = content",
            "/d/",
            "/d/a = content",
            "/d/b = content",
            "/l -> d",
            "/old = content",
        ]
    );
    let names = ["a2", "c", "d/a", "d/b", "old"];
    assert_eq!(links(&view, &names), [5; 5]);
    // The file's own entry speaks for it, for it comes last.
    let (_, inode) = at(&view, "d/b");
    assert_eq!((inode.uid, inode.mode & 0o7777), (0, 0o640));
}

#[test]
fn what_a_layer_below_has_is_linked_and_what_comes_later_wins() {
    let fixture = Fixture::new();
    let base = || Stream::new().file("target", "old");
    let view = fixture.view(vec![
        base(),
        Stream::new().hard("link", "target").file("target", "new"),
    ]);
    assert_eq!(tree(&view), ["/link = old", "/target = new"]);
    // The link's own name is listed again, or removed, or lost with its directory.
    let view = fixture.view(vec![
        Stream::new()
            .hard("a", "t")
            .hard("b", "t")
            .hard("d/c", "t")
            .hard("kept", "t")
            .hard("nobodys", "nothing")
            .file("a", "own")
            .file(".wh.b", "")
            .file("d", "was a directory")
            .file(".wh.nobodys", "")
            .file("t", "target"),
    ]);
    assert_eq!(
        tree(&view),
        [
            "/a = own",
            "/d = was a directory",
            "/kept = target",
            "/t = target"
        ]
    );
    assert_eq!(links(&view, &["a", "kept"]), [1, 2]);
}

#[test]
fn links_that_lead_to_no_file_are_refused() {
    let fixture = Fixture::new();
    let never = refused(&fixture, vec![Stream::new().hard("a", "b").hard("c", "a")]);
    assert!(
        never.contains("a: its hard link's target b does not exist"),
        "{never}"
    );
    // Not in the next layer either.
    let late = vec![Stream::new().hard("a", "b"), Stream::new().file("b", "")];
    let late = refused(&fixture, late);
    assert!(
        late.contains("a: its hard link's target b does not exist"),
        "{late}"
    );
    for stream in [
        Stream::new().hard("a", "a"),
        Stream::new().hard("a", "b").hard("b", "a"),
        Stream::new().hard("a", "b").hard("b", "c").hard("c", "a"),
        Stream::new().hard("a", "b").hard("b", "c").hard("c", "b"),
    ] {
        let circle = refused(&fixture, vec![stream]);
        assert!(circle.contains("circle"), "{circle}");
    }
    let directory = refused(&fixture, vec![Stream::new().hard("a", "d").dir("d")]);
    assert!(
        directory.contains("a: its hard link's target d is a directory"),
        "{directory}"
    );
    let removed = Stream::new().hard("a", "b").file("b", "").file(".wh.b", "");
    assert!(refused(&fixture, vec![removed]).contains("does not exist"));
}

/// Each link of a chain is followed once.
#[test]
fn long_chains_are_followed_in_any_order() {
    let fixture = Fixture::new();
    let name = |number: usize| format!("n{number:05}");
    for forward in [true, false] {
        let mut stream = Stream::new();
        for at in 0..5000 {
            let at = if forward { at } else { 4999 - at };
            stream = stream.hard(&name(at), &name(at + 1));
        }
        let view = fixture.view(vec![stream.file(&name(5000), "end")]);
        assert_eq!(links(&view, &[&name(0), &name(5000)]), [5001; 2]);
    }
}
