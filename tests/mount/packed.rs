//! Mounts of packed layers: when contents are compared with their names, and that the kernel reads large ones by itself.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::Signal;
use plywood::fuse::control::ControlClient;
use plywood::store::ObjectName;
use plywood::store::ingest::Settings;
use plywood::store::layers::{Expected, Layers as Store};
use plywood::store::view::Verify;

use crate::common::mode::{Mode, kernel_passes};
use crate::common::mount::wait_until;
use crate::common::{Layers, Mount, errno, mapping};

/// More than anything takes.
const LONG: Duration = Duration::from_secs(60);

fn content(name: &str, bytes: usize) -> Vec<u8> {
    let words = name.bytes().cycle().zip(0u32..);
    let words = words.flat_map(|(letter, number)| (number ^ u32::from(letter)).to_le_bytes());
    words.take(bytes).collect()
}

const LARGE: usize = 1 << 20;
const SMALL: usize = 10_000;

/// A store with one layer that has these files; those whose names begin with `large` are files of their own there.
struct Packed {
    layers: Layers,
    view: PathBuf,
}

impl Packed {
    fn new(files: &[&str]) -> Self {
        Self::keeping(true, files)
    }

    /// Whose large contents are kept as they are if they are to be `plain`, else in frames.
    fn keeping(plain: bool, files: &[&str]) -> Self {
        let layers = Layers::new(0);
        let settings = Settings {
            plain,
            ..Settings::default()
        };
        let (store, _) = Store::open(&layers.path("store"), settings).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        for name in files {
            let content = Self::content(name);
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &*content).unwrap();
        }
        let stream = builder.into_inner().unwrap();
        let layer = store.import(&*stream, &Expected::default(), &()).unwrap();
        let view = store.view(&[layer], Verify::Never).unwrap();
        let view = view.path().to_owned();
        Self { layers, view }
    }

    fn content(name: &str) -> Vec<u8> {
        content(
            name,
            if name.starts_with("large") {
                LARGE
            } else {
                SMALL
            },
        )
    }

    fn mount(&self, more: &str) -> Mount {
        Mount::with_options(&self.layers.mnt(), &self.options(more))
    }

    fn options(&self, more: &str) -> String {
        format!(
            "view={},upperdir={},workdir={},{more}",
            self.view.display(),
            self.layers.upper().display(),
            self.layers.path("work").display()
        )
    }

    /// The file that a large content is.
    fn object(&self, name: &str) -> PathBuf {
        let digits = ObjectName::of(&Self::content(name)).to_string();
        let dir = self.layers.path("store/objects").join(&digits[..2]);
        dir.join(digits)
    }

    fn damage(&self, name: &str) {
        let file = File::options().write(true).open(self.object(name));
        file.unwrap().write_all_at(b"rot", 5000).unwrap();
    }
}

fn read(mount: &Mount, name: &str) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(mount.join(name))?;
    // The kernel may have kept what was read before.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    Ok(content)
}

#[test]
fn damage_is_seen_when_the_option_says() {
    let files = ["large a", "large b", "small"];
    for (when, before, after) in [
        ("never", false, false),
        ("first", true, false),
        ("always", true, true),
    ] {
        let packed = Packed::new(&files);
        let mount = packed.mount(&format!("verify={when}"));
        packed.damage("large a");
        let first = read(&mount, "large a");
        assert_eq!(first.is_err(), before, "{when}");
        assert!(read(&mount, "large b").unwrap() == Packed::content("large b"));
        assert!(read(&mount, "small").unwrap() == Packed::content("small"));
        packed.damage("large b");
        let again = read(&mount, "large b");
        assert_eq!(again.is_err(), after, "{when}");
        for failed in [first, again].into_iter().filter_map(Result::err) {
            assert_eq!(failed.raw_os_error(), Some(libc::EIO), "{when}");
        }
        // And nothing else.
        assert!(read(&mount, "small").unwrap() == Packed::content("small"));
        mount.unmount();
    }
}

/// Once the whole of a large content was read and compared before any of it was handed out, and one bad byte took all of it.
#[test]
fn damage_to_a_part_of_a_large_content_is_an_error_there_until_it_is_mended() {
    const FRAME: u64 = 128 << 10;
    for when in ["first", "always"] {
        let packed = Packed::keeping(false, &["large"]);
        let object = packed.object("large");
        let sound = fs::read(&object).unwrap();
        let mut bad = sound.clone();
        // In its last frame.
        let at = bad.len() - 1000;
        bad[at] ^= 0x55;
        fs::write(&object, &bad).unwrap();
        let mount = packed.mount(&format!("verify={when}"));
        let file = File::open(mount.join("large")).unwrap();
        let content = Packed::content("large");
        let read = |offset: u64| {
            // With `always` an open is enough for the disk to be read.
            let opened = match when {
                "always" => Some(File::open(mount.join("large"))?),
                _ => None,
            };
            if opened.is_none() {
                posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            }
            let mut part = vec![0; 5000];
            let file = opened.as_ref().unwrap_or(&file);
            file.read_exact_at(&mut part, offset)?;
            assert!(
                part == content[offset as usize..][..5000],
                "{when}: {offset}"
            );
            Ok::<_, std::io::Error>(())
        };
        let last = LARGE as u64 - FRAME;
        for offset in [0, FRAME - 2500, last - 5000] {
            read(offset).unwrap();
        }
        for offset in [last, last - 2500, LARGE as u64 - 5000] {
            assert_eq!(errno(read(offset)), libc::EIO, "{when}: {offset}");
        }
        read(0).unwrap();
        // As a repair does it. Who has the file open need not open it again.
        let put = |bytes: &[u8]| {
            let new = packed.layers.path("new");
            fs::write(&new, bytes).unwrap();
            fs::rename(&new, &object).unwrap();
        };
        put(&sound);
        file.read_exact_at(&mut [0; 5000], last).unwrap();
        for offset in [last, last - 2500, LARGE as u64 - 5000] {
            read(offset).unwrap();
        }
        // What was read before is compared once more for who opens the file with `always`, and not else.
        put(&bad);
        let again = File::open(mount.join("large")).unwrap();
        let read_again = again.read_exact_at(&mut [0; 5000], LARGE as u64 - 5000);
        assert_eq!(read_again.is_err(), when == "always", "{when}");
        drop((file, again));
        mount.unmount();
    }
}

#[test]
fn a_change_of_a_large_content_reads_the_part_that_it_changes() {
    let packed = Packed::keeping(false, &["large"]);
    let object = packed.object("large");
    let mut bytes = fs::read(&object).unwrap();
    // Everything but what comes before the frames, and the last ones.
    let (from, to) = (1000, bytes.len() - bytes.len() / 4);
    bytes[from..to].fill(0);
    fs::write(&object, &bytes).unwrap();
    // A chunk is copied up at a time.
    let mount = packed.mount("copy_whole=64K,complete=off");
    let writer = File::options().append(true).open(mount.join("large"));
    std::io::Write::write_all(&mut writer.unwrap(), b"more").unwrap();
    let mut expected = Packed::content("large");
    expected.extend_from_slice(b"more");
    let file = File::open(mount.join("large")).unwrap();
    let mut last = vec![0; 10_004];
    file.read_exact_at(&mut last, (LARGE - 10_000) as u64)
        .unwrap();
    assert!(last == expected[LARGE - 10_000..]);
    drop(file);
    mount.unmount();
}

#[test]
fn verifying_always_needs_to_be_told_of_opens() {
    let packed = Packed::new(&["large"]);
    let mount = packed.mount("verify=always,no_open");
    assert!(read(&mount, "large").is_ok());
    packed.damage("large");
    assert_eq!(errno(File::open(mount.join("large"))), libc::EIO);
    mount.unmount();
}

#[test]
fn large_contents_are_passed_once_they_were_found_sound() {
    let packed = Packed::new(&["large", "large bad", "small"]);
    packed.damage("large bad");
    let mount = packed.mount("passthrough,kernel_features=+passthrough");
    if !kernel_passes() {
        return;
    }
    let before = fs::read(packed.object("large")).unwrap();
    assert!(read(&mount, "small").unwrap() == Packed::content("small"));
    // Damaged, it is not handed to the kernel.
    for _ in 0..2 {
        let bad = read(&mount, "large bad").unwrap_err();
        assert_eq!(bad.raw_os_error(), Some(libc::EIO));
    }
    let mut passed = File::open(mount.join("large")).unwrap();
    // A write goes to a copy, and never to the object.
    let writer = File::options().write(true).open(mount.join("large"));
    writer.unwrap().write_all_at(b"new", 0).unwrap();
    assert!(fs::read(packed.object("large")).unwrap() == before);
    mount.signal(Signal::SIGKILL);
    assert!(mount.wait_for_end());
    let mut content = Vec::new();
    passed.read_to_end(&mut content).unwrap();
    assert!(content == Packed::content("large"));
    let again = format!("/proc/self/fd/{}", passed.as_raw_fd());
    assert!(File::options().write(true).open(again).is_err());
    assert!(fs::read(packed.object("large")).unwrap() == before);
}

/// Who had it open went on with what the kernel had kept of it, or with the old file.
#[test]
fn what_was_mended_is_read_by_what_is_open_of_it() {
    const AT: u64 = 500_000;
    const FILES: [&str; 2] = ["large read", "large written"];
    const PASSTHROUGH: &str = "passthrough,kernel_features=+passthrough";
    let rot = |file: &File| {
        let mut bytes = [0; 3];
        file.read_exact_at(&mut bytes, AT).unwrap();
        bytes == *b"rot"
    };
    for options in ["", "writeback", "no_open", "no_open,writeback", PASSTHROUGH] {
        let packed = Packed::new(&FILES);
        let control = packed.layers.path("control");
        let more = format!("copy_whole=64K,complete=off,{options}");
        let mount = Mount::with_control(&packed.layers.mnt(), &packed.options(&more), &control);
        let passes = match options {
            "" => Mode::of_run().passes(),
            PASSTHROUGH => kernel_passes(),
            _ => false,
        };
        for name in FILES {
            assert!(read(&mount, name).unwrap() == Packed::content(name));
        }
        let [reader, beside] = FILES.map(|name| File::open(mount.join(name)).unwrap());
        let map = mapping::shared(&reader);
        // Read without requests, it has a second number from now on.
        let mut options_to_write = File::options();
        options_to_write.read(true).write(true);
        let writer = options_to_write.open(mount.join(FILES[1])).unwrap();
        writer.write_all_at(b"new", 0).unwrap();
        for name in FILES {
            let object = packed.object(name);
            let sound = fs::read(&object).unwrap();
            let file = File::options().write(true).open(&object);
            file.unwrap().write_all_at(b"rot", AT).unwrap();
            let new = packed.layers.path("new");
            fs::write(&new, sound).unwrap();
            for file in [&reader, &beside, &writer] {
                posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            }
            let all = match name == FILES[0] {
                true => [&reader, &reader],
                false => [&beside, &writer],
            };
            assert!(all.into_iter().all(rot), "{options}: {name}");
            fs::rename(&new, &object).unwrap();
        }
        assert!(map[AT as usize..].starts_with(b"rot"), "{options}");

        let (client, _) = ControlClient::connect(&control, LONG).unwrap();
        client.refresh(LONG).unwrap();
        // By the kernel alone, the old file is read by whoever joins those who have it open.
        let joined = File::open(mount.join(FILES[0])).unwrap();
        for (file, what) in [
            (&reader, "reader"),
            (&beside, "beside"),
            (&joined, "joined"),
        ] {
            assert_eq!(rot(file), passes, "{options}: {what}");
        }
        assert_eq!(map[AT as usize..].starts_with(b"rot"), passes, "{options}");
        assert!(!rot(&writer), "{options}");
        drop((reader, beside, joined, map, writer));
        assert!(wait_until(|| {
            read(&mount, FILES[0]).unwrap() == Packed::content(FILES[0])
        }));
        let mut written = Packed::content(FILES[1]);
        written[..3].copy_from_slice(b"new");
        assert!(read(&mount, FILES[1]).unwrap() == written, "{options}");
        mount.unmount();
    }
}
