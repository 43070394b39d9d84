//! What 1, 5 and 20 mounts of one image add to the host's memory after the same programs ran in each.

use super::rows::python;
use super::systems::{Image, System, drop_caches};

/// Bytes in use: with and without what the kernel could drop.
fn in_use() -> Result<(u64, u64), String> {
    let text =
        std::fs::read_to_string("/proc/meminfo").map_err(|e| format!("/proc/meminfo: {e}"))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| {
                let kib = l.strip_prefix(name)?.strip_prefix(':')?.trim();
                kib.strip_suffix(" kB")?.parse::<u64>().ok()
            })
            .ok_or(format!("/proc/meminfo has no {name}"))
    };
    let total = field("MemTotal")?;
    Ok((
        (total - field("MemFree")?) << 10,
        (total - field("MemAvailable")?) << 10,
    ))
}

pub fn run(systems: &[System], image: &Image) -> Result<(), String> {
    println!(
        "\nMiB that mounts of the image add to the host after Python imports ran in each, with caches \
         (without):\n"
    );
    print!("| mounts |");
    for s in systems {
        print!(" {} |", s.name);
    }
    println!("\n|---|{}", "---|".repeat(systems.len()));
    for count in [1, 5, 20] {
        print!("| {count} |");
        for system in systems {
            drop_caches()?;
            let before = in_use()?;
            let mut mounts = Vec::new();
            for i in 0..count {
                let base = image
                    .dir
                    .with_file_name(format!("memory-{}-{i}", std::process::id()));
                let mount = system.mount_at(image, base)?;
                python(&mount.root(), 1)?;
                mounts.push(mount);
            }
            let after = in_use()?;
            let mib = |a: u64, b: u64| a.saturating_sub(b) as f64 / f64::from(1 << 20);
            print!(
                " {:.0} ({:.0}) |",
                mib(after.0, before.0),
                mib(after.1, before.1)
            );
        }
        println!();
    }
    Ok(())
}
