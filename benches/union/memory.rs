//! What 1, 5 and 20 mounts of one image add to the host's memory after the same programs ran in each.
//!
//! The servers and the programs run in a memory cgroup of their own, which is charged for what they
//! allocate, for the pages of files that they are the first to read, and for the kernel's objects made on
//! their behalf. So what else the machine does is not in the figures, as it would be in a difference of
//! the host's free memory.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::common::drop_caches;
use super::rows::python;
use super::systems::{Image, System};

/// Bytes charged to a cgroup.
struct Charged {
    /// Of processes: the servers', since the programs have ended.
    anonymous: u64,
    /// Cached content of files, of the union's and of the layers' below it.
    cached: u64,
    /// The kernel's objects: inodes, directory entries, page tables.
    kernel: u64,
}

/// The number after `key` in a table of keys and numbers.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// A memory cgroup with this process in it; left and removed when dropped.
struct Group {
    dir: PathBuf,
    /// Where the process was before.
    home: PathBuf,
    /// The unified hierarchy, whose files have other names.
    unified: bool,
}

impl Group {
    fn enter(name: &str) -> Result<Self, String> {
        let memberships = read(Path::new("/proc/self/cgroup"))?;
        let place = |wanted: &str| {
            memberships.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                let found = match wanted {
                    "" => controllers.is_empty(),
                    _ => controllers.split(',').any(|c| c == wanted),
                };
                found.then(|| path.trim_start_matches('/').to_owned())
            })
        };
        let (top, home, unified) = match (place("memory"), place("")) {
            (Some(home), _) => (Path::new("/sys/fs/cgroup/memory"), home, false),
            (None, Some(home)) => (Path::new("/sys/fs/cgroup"), home, true),
            (None, None) => return Err("there is no memory cgroup to measure with".into()),
        };
        if unified {
            let control = top.join("cgroup.subtree_control");
            fs::write(&control, "+memory").map_err(|e| format!("{}: {e}", control.display()))?;
        }
        let group = Self {
            dir: top.join(format!("plywood-bench-{}-{name}", std::process::id())),
            home: top.join(home),
            unified,
        };
        fs::create_dir(&group.dir).map_err(|e| format!("{}: {e}", group.dir.display()))?;
        group.join(&group.dir)?;
        Ok(group)
    }

    fn join(&self, dir: &Path) -> Result<(), String> {
        fs::write(dir.join("cgroup.procs"), std::process::id().to_string())
            .map_err(|e| format!("{}/cgroup.procs: {e}", dir.display()))
    }

    fn charged(&self) -> Result<Charged, String> {
        let stat = read(&self.dir.join("memory.stat"))?;
        let of = |key: &str| field(&stat, key).ok_or_else(|| format!("memory.stat has no {key:?}"));
        if self.unified {
            return Ok(Charged {
                anonymous: of("anon ")?,
                cached: of("file ")?,
                kernel: of("kernel ")?,
            });
        }
        let kernel = read(&self.dir.join("memory.kmem.usage_in_bytes"))?;
        Ok(Charged {
            anonymous: of("rss ")?,
            cached: of("cache ")?,
            kernel: kernel
                .trim()
                .parse()
                .map_err(|e| format!("memory.kmem.usage_in_bytes: {e}"))?,
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A server ends a moment after its mount is gone.
        let deadline = Instant::now() + Duration::from_secs(10);
        let left = self.join(&self.home).and_then(|()| {
            loop {
                match fs::remove_dir(&self.dir) {
                    Err(e) if e.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    result => return result.map_err(|e| e.to_string()),
                }
            }
        });
        if let Err(e) = left {
            eprintln!("bench: the cgroup {} stays: {e}", self.dir.display());
        }
    }
}

/// Mounts the image `count` times, runs the programs in each and answers what that is charged.
fn measure(system: &System, image: &Image, count: usize) -> Result<Charged, String> {
    drop_caches()?;
    // Dropped after the mounts, when no server is in it any more.
    let group = Group::enter(&format!("{}-{count}", system.name.replace(' ', "-")))?;
    let mut mounts = Vec::new();
    for i in 0..count {
        let name = format!("memory-{}-{i}", std::process::id());
        let mount = system.mount_at(image, image.dir.with_file_name(name))?;
        python(&mount.root(), 1)?;
        mounts.push(mount);
    }
    group.charged()
}

pub fn run(systems: &[System], image: &Image) -> Result<(), String> {
    println!(
        "\nMiB that mounts of the image add to the host after Python imports ran in each \
         (memory of the servers + cached files + kernel objects):\n"
    );
    print!("| mounts |");
    for s in systems {
        print!(" {} |", s.name);
    }
    println!("\n|---|{}", "---|".repeat(systems.len()));
    for count in [1, 5, 20] {
        print!("| {count} |");
        for system in systems {
            let charged = measure(system, image, count)?;
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            print!(
                " {:.0} ({:.1} + {:.0} + {:.0}) |",
                mib(charged.anonymous + charged.cached + charged.kernel),
                mib(charged.anonymous),
                mib(charged.cached),
                mib(charged.kernel)
            );
        }
        println!();
    }
    Ok(())
}
