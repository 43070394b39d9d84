//! What large lower files cost: room on the host, and descriptors.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::statvfs::statvfs;

use crate::common::disk::{Attached, Disk};
use crate::common::{Layers, Mount};

const MIB: u64 = 1 << 20;

/// Layers on a disk of their own.
struct Place {
    layers: Layers,
    base: PathBuf,
    _disk: Attached,
}

impl Place {
    /// None where the kernel lacks the file system.
    fn on(disk: Disk) -> Option<Self> {
        let layers = Layers::new(1);
        let base = layers.path("disk");
        fs::create_dir(&base).unwrap();
        let disk = disk.attach(&base)?;
        for name in ["lower", "upper", "work"] {
            fs::create_dir(base.join(name)).unwrap();
        }
        Some(Self {
            layers,
            base,
            _disk: disk,
        })
    }

    fn lower(&self) -> PathBuf {
        self.base.join("lower")
    }

    fn upper(&self) -> PathBuf {
        self.base.join("upper")
    }

    fn mount(&self) -> Mount {
        let base = self.base.display();
        let options = format!("lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work");
        Mount::with_options(&self.layers.mnt(), &options)
    }

    /// Bytes that are taken on the disk.
    fn used(&self) -> u64 {
        nix::unistd::syncfs(File::open(&self.base).unwrap()).unwrap();
        let stat = statvfs(&self.base).unwrap();
        (stat.blocks() - stat.blocks_free()) * stat.fragment_size()
    }
}

/// Bytes that a tree takes on the host.
fn taken(dir: &Path) -> u64 {
    let mut sum = 512 * fs::symlink_metadata(dir).unwrap().blocks();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        sum += match entry.file_type().unwrap().is_dir() {
            true => taken(&entry.path()),
            false => 512 * entry.metadata().unwrap().blocks(),
        };
    }
    sum
}

fn pattern(length: u64) -> Vec<u8> {
    (0..length).map(|at| ((at >> 12) ^ at) as u8 | 1).collect()
}

fn run(program: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).output();
    let output = output.unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_first_write_to_10_gib_takes_one_chunk_of_ext4_and_holes_stay() {
    const HUGE: u64 = 10 << 30;
    const AT: u64 = 7 << 30;
    let place = Place::on(Disk::Ext4 {
        mib: 64,
        reserved: 0,
    });
    let place = place.expect("a kernel with ext4");
    let data = pattern(4 * MIB);
    let file = File::create(place.lower().join("f")).unwrap();
    file.set_len(HUGE).unwrap();
    file.write_all_at(&data, AT).unwrap();
    drop(file);
    let mount = place.mount();
    let file = File::options().read(true).write(true).open(mount.join("f"));
    let file = file.unwrap();
    let (before, used) = (taken(&place.upper()), place.used());
    file.write_all_at(&[b'x'; 4096], AT + MIB + 100).unwrap();
    file.sync_all().unwrap();
    // The chunk, and what ext4 needs to find it.
    let most = (64 << 10) + (16 << 10);
    let chunk = taken(&place.upper()) - before;
    assert!((64 << 10..=most).contains(&chunk), "{chunk}");
    // The map has 16 bytes for 64 chunks.
    let all = place.used() - used;
    assert!(all <= most + HUGE / (64 << 10) / 4 + (64 << 10), "{all}");
    let mut expected = data;
    expected[MIB as usize + 100..][..4096].fill(b'x');
    let check = |file: &File| {
        let mut seen = vec![0; expected.len()];
        file.read_exact_at(&mut seen, AT).unwrap();
        assert!(seen == expected);
        assert_eq!(file.metadata().unwrap().len(), HUGE);
        let mut hole = [1; 4096];
        file.read_exact_at(&mut hole, AT - 8192).unwrap();
        assert_eq!(hole, [0; 4096]);
    };
    check(&file);
    drop(file);
    mount.unmount();
    assert!(!place.base.join("work/work/incompat").exists());
    let file = File::open(place.upper().join("f")).unwrap();
    check(&file);
    let blocks = 512 * file.metadata().unwrap().blocks();
    assert!(blocks <= 4 * MIB + most, "{blocks}");
}

#[test]
fn attributes_of_a_large_tree_cost_less_than_a_hundredth_of_it() {
    // A GiB, of which so much is data that a copy with all its holes would be seen.
    const FILES: u64 = 512;
    const SIZE: u64 = 2 * MIB;
    const DATA: u64 = 128 << 10;
    let layers = Layers::new(1);
    let mut data = pattern(DATA);
    for number in 0..FILES {
        let name = format!("tree/d{}/f{number}", number % 4);
        let path = layers.lower(0).join(name);
        Layers::write(&path, &data);
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(SIZE).unwrap();
    }
    data.resize(SIZE as usize, 0);
    let mount = Mount::new(&layers, "");
    let tree = mount.join("tree");
    run("chown", &["-R", "1234:1235"], &tree);
    run("chmod", &["-R", "g+w,o-r"], &tree);
    // Without -c it would open the files for writing.
    let each = ["-exec", "touch", "-c", "-d", "2001-02-03", "{}", "+"];
    let found = Command::new("find").arg(&tree).args(each).status();
    assert!(found.unwrap().success());
    for number in 0..FILES {
        let name = tree.join(format!("d{}/f{number}", number % 4));
        rustix::fs::setxattr(&name, "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
        let stat = fs::metadata(&name).unwrap();
        assert_eq!((stat.uid(), stat.gid(), stat.len()), (1234, 1235, SIZE));
        assert_eq!(stat.mode() & 0o777, 0o660);
    }
    assert!(fs::read(tree.join("d3/f511")).unwrap() == data);
    let upper = layers.upper();
    let cost = taken(&upper);
    assert!(cost < FILES * SIZE / 100, "{cost}");
    mount.unmount();
    let cost = taken(&upper);
    assert!(cost < FILES * SIZE / 100, "{cost} after the mount");
}

#[test]
fn where_the_host_can_share_content_a_large_file_is_shared_whole() {
    const SIZE: u64 = 24 * MIB;
    for disk in [Disk::Xfs, Disk::Btrfs] {
        let Some(place) = Place::on(disk) else {
            eprintln!("skipped: this kernel has no {disk:?}");
            continue;
        };
        let mut expected = pattern(SIZE);
        fs::write(place.lower().join("f"), &expected).unwrap();
        let used = place.used();
        let mount = place.mount();
        let file = File::options().read(true).write(true).open(mount.join("f"));
        let file = file.unwrap();
        file.write_all_at(&[b'x'; 4096], 5 * MIB).unwrap();
        file.sync_all().unwrap();
        expected[5 * MIB as usize..][..4096].fill(b'x');
        // No map is needed: the upper has all of it, and shares what was not written.
        assert!(!place.base.join("work/work/incompat").exists(), "{disk:?}");
        let copy = place.upper().join("f");
        assert!(fs::read(&copy).unwrap() == expected, "{disk:?}");
        let extents = run("filefrag", &["-sv"], &copy);
        assert!(extents.contains("shared"), "{disk:?}: {extents}");
        let more = place.used().saturating_sub(used);
        assert!(more < SIZE / 4, "{disk:?}: {more}");
        assert!(fs::read(mount.join("f")).unwrap() == expected, "{disk:?}");
        drop(file);
        mount.unmount();
        assert!(fs::read(place.lower().join("f")).unwrap() == pattern(SIZE));
    }
}

#[test]
fn what_the_host_keeps_for_root_is_room_for_root() {
    let place = Place::on(Disk::Ext4 {
        mib: 64,
        reserved: 40,
    });
    let place = place.expect("a kernel with ext4");
    // The lower lies elsewhere, or it would take the room.
    let lower = place.layers.lower(0);
    let room = statvfs(&place.base).unwrap();
    let bytes = |blocks| blocks * room.fragment_size();
    let size = bytes(room.blocks_available() + room.blocks_free()) / 2;
    assert!(bytes(room.blocks_available()) + 4 * MIB < size);
    let mut expected = pattern(size);
    fs::write(lower.join("f"), &expected).unwrap();
    // How many blocks it has is known when it is written back, and they are to stay the same.
    File::open(lower.join("f")).unwrap().sync_all().unwrap();
    let base = place.base.display();
    let options = format!(
        "{},upperdir={base}/upper,workdir={base}/work",
        place.layers.lower_options()
    );
    let mount = Mount::with_options(&place.layers.mnt(), &options);
    let file = File::options().write(true).open(mount.join("f")).unwrap();
    file.write_all_at(b"written", MIB).unwrap();
    expected[MIB as usize..][..7].copy_from_slice(b"written");
    drop(file);
    mount.unmount();
    assert!(!place.base.join("work/work/incompat").exists());
    assert!(fs::read(place.upper().join("f")).unwrap() == expected);
}

#[test]
fn any_number_of_incomplete_files_is_open_with_1024_descriptors() {
    const FILES: usize = 600;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let layers = Layers::new(1);
    for number in 0..FILES {
        fs::write(layers.lower(0).join(format!("f{number}")), [1; 3 * 4096]).unwrap();
    }
    let more = ",chunk_size=4K,copy_whole=0,complete=off";
    let mount = Mount::with_few_files(&layers.mnt(), &(layers.options() + more));
    // Of each there are two descriptors and a map, which are 1800.
    let files: Vec<File> = (0..FILES)
        .map(|number| {
            let path = mount.join(format!("f{number}"));
            let file = File::options().read(true).write(true).open(path);
            file.unwrap()
        })
        .collect();
    std::thread::scope(|scope| {
        for part in files.chunks(FILES / 4) {
            scope.spawn(move || {
                for round in 2..4u8 {
                    for file in part {
                        file.write_all_at(&[round; 100], 5000).unwrap();
                    }
                    for file in part {
                        let mut seen = [0; 3 * 4096];
                        file.read_exact_at(&mut seen, 0).unwrap();
                        let mut expected = [1; 3 * 4096];
                        expected[5000..5100].fill(round);
                        assert!(seen == expected);
                    }
                }
            });
        }
    });
    let held = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap();
    let held = held.count();
    assert!(held < 1024, "{held}");
    // A sync of the whole looks at every map.
    files[0].sync_all().unwrap();
    drop(files);
    mount.unmount();
    for number in 0..FILES {
        let copy = fs::read(layers.upper().join(format!("f{number}"))).unwrap();
        assert!(copy[..5000] == [1; 5000] && copy[5000..5100] == [3; 100]);
    }
}
