//! The configurations for containerd that are shipped. Releases of containerd run with them in tests/containerd.rs;
//! here they are held against each other and against plyd.

use std::fs;
use std::path::Path;

use toml::{Table, Value};

use super::common::PLYD;

const SNAPSHOTTER: &str = "plywood";
const DIFFER: &str = "plywood-diff";

fn read(name: &str) -> Table {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/containerd");
    fs::read_to_string(dir.join(name)).unwrap().parse().unwrap()
}

/// What lies at a path of keys, which must all be there.
fn at<'a>(table: &'a Table, keys: &[&str]) -> &'a Value {
    let (first, rest) = keys.split_first().unwrap();
    let found = table.get(*first);
    let found = found.unwrap_or_else(|| panic!("no {first:?} in {table}"));
    rest.iter().fold(found, |value, key| {
        value
            .get(key)
            .unwrap_or_else(|| panic!("no {key:?} in {value}"))
    })
}

fn keys(value: &Value) -> Vec<&str> {
    let table = value.as_table().unwrap();
    table.keys().map(String::as_str).collect()
}

fn text<'a>(table: &'a Table, path: &[&str]) -> &'a str {
    at(table, path).as_str().unwrap()
}

/// A default from plyd's own `--help`.
fn default_of(option: &str) -> String {
    let help = std::process::Command::new(PLYD).arg("--help").output();
    let help = String::from_utf8(help.unwrap().stdout).unwrap();
    let (_, after) = help.split_once(option).expect("the option");
    let (_, after) = after.split_once("[default: ").expect("its default");
    after.split_once(']').unwrap().0.to_owned()
}

#[test]
fn the_configurations_for_containerd_say_the_same() {
    // The ids of containerd 1.6 and 1.7, and those that the 2.x releases gave to the same settings.
    const CRI: &str = "io.containerd.grpc.v1.cri";
    const IMAGES: &str = "io.containerd.cri.v1.images";
    const DIFFERS: &str = "io.containerd.service.v1.diff-service";
    const TRANSFER: &str = "io.containerd.transfer.v1.local";
    let (six, seven) = (read("config.toml"), read("config-1.7.toml"));
    let two = read("config-2.toml");
    for (config, version, differ) in [(&six, 2, false), (&seven, 2, true), (&two, 3, true)] {
        assert_eq!(at(config, &["version"]).as_integer(), Some(version));
        let mut plugins = vec![(SNAPSHOTTER, "snapshot")];
        plugins.extend(differ.then_some((DIFFER, "diff")));
        let names: Vec<_> = plugins.iter().map(|(name, _)| *name).collect();
        assert_eq!(keys(at(config, &["proxy_plugins"])), names);
        for (name, kind) in plugins {
            let plugin = |key| text(config, &["proxy_plugins", name, key]);
            assert_eq!(plugin("type"), kind);
            let address = format!("unix://{}", plugin("address"));
            assert_eq!(address, default_of("--address"));
        }
    }
    assert_eq!(keys(at(&six, &["plugins"])), [CRI]);
    assert_eq!(keys(at(&seven, &["plugins"])), [CRI, DIFFERS]);
    assert_eq!(keys(at(&two, &["plugins"])), [IMAGES, DIFFERS, TRANSFER]);
    for config in [&seven, &two] {
        let differs = at(config, &["plugins", DIFFERS, "default"]).as_array();
        let differs: Vec<_> = differs.unwrap().iter().filter_map(Value::as_str).collect();
        assert_eq!(differs, [DIFFER, "walking"]);
    }
    for config in [&six, &seven] {
        let cri = ["plugins", CRI, "containerd", "snapshotter"];
        assert_eq!(text(config, &cri), SNAPSHOTTER);
    }
    let images = ["plugins", IMAGES, "snapshotter"];
    assert_eq!(text(&two, &images), SNAPSHOTTER);
    let unpack = at(&two, &["plugins", TRANSFER, "unpack_config"]);
    let [unpack] = &unpack.as_array().unwrap()[..] else {
        panic!("not one platform: {unpack}");
    };
    let unpack = unpack.as_table().unwrap();
    assert_eq!(text(unpack, &["snapshotter"]), SNAPSHOTTER);
    assert_eq!(text(unpack, &["differ"]), DIFFER);
    assert_eq!(text(unpack, &["platform"]), "linux/amd64");
    let exports = ["proxy_plugins", SNAPSHOTTER, "exports", "root"];
    assert_eq!(text(&two, &exports), default_of("--root"));
}
