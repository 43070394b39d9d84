//! From inodes back to their names.

use super::*;

#[test]
fn every_path_is_found_from_its_inode() {
    let fixture = Fixture::new();
    // Directories that are empty stand between others in the order of entries.
    let mut stream = Stream::new().dir("empty").dir("z").dir("z/empty");
    for number in 0..400 {
        stream = stream.file(&format!("d{}/e{}/f{number}", number % 5, number % 7), "");
        stream = stream.dir(&format!("d{}/empty{number}", number % 11));
        if number % 3 == 0 {
            let target = format!("d{}/e{}/f{number}", number % 5, number % 7);
            stream = stream.hard(&format!("z/link{}", 1000 - number), &target);
        }
    }
    let view = fixture.view(vec![stream.hard("a", "z/link1000").hard("z/link", "a")]);
    let mut expected: HashMap<u32, Vec<Vec<u8>>> = HashMap::new();
    let mut ways: HashMap<u32, Vec<&[u8]>> = HashMap::new();
    let mut waiting = vec![(Vec::new(), View::ROOT)];
    while let Some((above, number)) = waiting.pop() {
        let directory = view.inode(number).unwrap();
        for place in 0..directory.count {
            let entry = view.nth(&directory, place).unwrap().unwrap();
            let path = [&above, entry.name].concat();
            ways.entry(number).or_default().push(entry.name);
            expected.entry(entry.inode).or_default().push(path.clone());
            waiting.push(([&path, &b"/"[..]].concat(), entry.inode));
        }
    }
    let names = view.names().unwrap();
    for number in 0..view.len() {
        let mut found = names.paths(number).unwrap();
        found.sort();
        let mut expected = expected.remove(&number).unwrap_or_default();
        expected.sort();
        assert_eq!(found, expected, "{number}");
    }
    let mut all = names.ways_to(1..view.len()).unwrap();
    all.values_mut().for_each(|names| names.sort_unstable());
    assert_eq!(all, ways);
    let (linked, inode) = at(&view, "a");
    assert_eq!(inode.links, 4);
    let found = names.ways_to([linked]).unwrap();
    let of = |path: &str| found[&at(&view, path).0].as_slice();
    assert_eq!(of("d0/e0"), [b"f0"]);
    assert_eq!(found[&View::ROOT].len(), 3, "a, d0 and z");
    assert_eq!(found.len(), 4);
}
