//! dpkg: unpacks beside the old file, links, renames over it, fsyncs; its database lies in the lower.

use crate::Ground;

/// Builds `NAME_VERSION.deb` from what is in the tree `t`.
const DEB: &str = r#"deb() { # VERSION
  mkdir -p t/DEBIAN
  printf 'Package: sample\nVersion: %s\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: sample\n' $1 > t/DEBIAN/control
  dpkg-deb -b --root-owner-group t sample_$1.deb > /dev/null; rm -r t
}"#;

#[test]
fn dpkg_installs_upgrades_and_removes() {
    let ground = Ground::new(
        "mkdir -p var/lib/dpkg/info var/lib/dpkg/updates usr/share; touch var/lib/dpkg/status usr/share/other",
    );
    let debs = ground.outside("debs");
    crate::sh(
        &debs,
        &format!(
            "{DEB}
             mkdir -p t/usr/share/sample/sub; for i in $(seq 100); do echo one $i > t/usr/share/sample/f$i; done
             ln t/usr/share/sample/f1 t/usr/share/sample/hard; ln -s f2 t/usr/share/sample/soft
             echo gone > t/usr/share/sample/sub/gone; deb 1
             mkdir -p t/usr/share/sample; for i in $(seq 50 150); do echo two $i > t/usr/share/sample/f$i; done; deb 2"
        ),
    );
    let dpkg = |what: &str| {
        let root = ground.root().display();
        let path = debs.display();
        crate::sh(
            ground.root(),
            &format!("cd {path}; dpkg --root={root} --log=/dev/null {what}"),
        )
    };
    dpkg("-i sample_1.deb");
    assert_eq!(
        ground.sh("cd usr/share/sample; stat -c %h f1; cat soft; ls | wc -l"),
        "2\none 2\n103\n"
    );
    dpkg("-i sample_2.deb");
    assert_eq!(
        ground.sh("cd usr/share/sample; cat f60; ls | wc -l"),
        "two 60\n101\n"
    );
    assert_eq!(dpkg("-V sample"), "");
    dpkg("-P sample");
    assert_eq!(ground.sh("ls usr/share"), "other\n");
    ground.finish();
}
