//! What a mount and a look-up cost, counted in what they read: clocks of busy machines tell nothing.

use super::*;

/// One layer for each list of the numbers of its files.
fn view(fixture: &Fixture, layers: impl Iterator<Item = Vec<usize>>) -> View {
    let layer = |files: Vec<usize>| {
        let add = |stream: Stream, file: usize| {
            let path = format!("dir-{:03}/file-{file:06}", file % 50);
            stream.file(&path, &file.to_string())
        };
        files.into_iter().fold(Stream::new(), add)
    };
    let chain = fixture.chain(layers.map(layer).collect());
    let built = fixture.layers.view(&chain, Verify::First).unwrap();
    let path = built.path().to_owned();
    drop(built);
    View::open_stored(&path, Verify::First).unwrap()
}

/// Pages of the index that were read for looking up a file.
fn pages_for(view: &View, file: usize) -> usize {
    let before = view.file.pages_read();
    let root = view.inode(View::ROOT).unwrap();
    let name = format!("dir-{:03}", file % 50);
    let directory = view.lookup(&root, name.as_bytes()).unwrap().unwrap();
    let directory = view.inode(directory.inode).unwrap();
    let name = format!("file-{file:06}");
    let found = view.lookup(&directory, name.as_bytes()).unwrap().unwrap();
    assert_eq!(
        view.inode(found.inode).unwrap().size,
        file.to_string().len() as u64
    );
    view.file.pages_read() - before
}

#[test]
fn opening_a_view_reads_as_much_of_a_large_image_as_of_a_small_one() {
    let fixture = Fixture::new();
    let views = [100, 20_000].map(|files| view(&fixture, std::iter::once((0..files).collect())));
    assert!(views[1].bytes() > 50 * views[0].bytes());
    // Of the root.
    assert_eq!(views.map(|view| view.file.pages_read()), [1, 1]);
}

#[test]
fn a_lookup_reads_as_much_in_a_view_of_many_layers_as_in_one_of_one() {
    const FILES: usize = 2000;
    let fixture = Fixture::new();
    let views = [1, 16, 128].map(|layers| {
        let of = |layer| (layer..FILES).step_by(layers).collect();
        view(&fixture, (0..layers).map(of))
    });
    for file in [0, 999, FILES - 1] {
        let pages = views.each_ref().map(|view| pages_for(view, file));
        assert_eq!(pages, [pages[0]; 3], "file {file}");
    }
    // Each layer's name has 32 bytes, and 4096 of those a sum.
    for (view, layers) in views.iter().zip([1, 16, 128]) {
        let most = views[0].bytes() + 33 * layers + 64;
        assert!(view.bytes() <= most, "{layers}: {}", view.bytes());
    }
}
