//! make: nothing but time stamps decides what it does.

use crate::Ground;

#[test]
fn make_rebuilds_what_is_out_of_date_and_nothing_else() {
    let mut ground = Ground::new(
        r#"mkdir src; for i in 1 2 3 4 5; do echo $i > src/$i.in; done
        printf 'all: $(patsubst src/%%.in,out/%%,$(wildcard src/*.in))\nout/%%: src/%%.in\n\t@mkdir -p out; echo build $*; cp $< $@\n' > Makefile
        make > /dev/null; find . -exec touch -d 2020-01-01 {} +; touch -d 2020-01-02 out/*"#,
    );
    let make = "make -s | grep build || true";
    assert_eq!(ground.sh(make), "", "everything in the lower is up to date");
    ground.sh("echo new > src/3.in");
    assert_eq!(ground.sh(make), "build 3\n");
    // A change of attributes copies up and leaves the time as it was.
    ground.sh("chmod 600 src/4.in; chown 5 src/5.in");
    assert_eq!(ground.sh(make), "");
    ground.remount();
    assert_eq!(ground.sh(make), "");
    assert_eq!(
        ground.sh("rm -r out; make -s | wc -l; cat out/*"),
        "5\n1\n2\nnew\n4\n5\n"
    );
    ground.finish();
}
