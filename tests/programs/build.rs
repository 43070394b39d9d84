//! make and cargo: nothing but time stamps decides what they do.

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

#[test]
fn cargo_rebuilds_what_is_out_of_date_and_nothing_else() {
    let mut ground = Ground::new(
        r#"cargo -q new --vcs none --name hello project; cd project
        cargo -q new --lib --vcs none part; cargo -q add --offline --path part 2> /dev/null
        echo 'pub fn word() -> &'"'"'static str { "lower" }' > part/src/lib.rs
        echo 'fn main() { println!("{}", part::word()); }' > src/main.rs
        cargo -q build --offline"#,
    );
    // What cargo says of each package that it compiles.
    let build = "cd project; cargo build --offline 2>&1 | grep -o 'Compiling [a-z]*' || true; target/debug/hello";
    assert_eq!(
        ground.sh(build),
        "lower\n",
        "everything in the lower is up to date"
    );
    ground.sh("cd project; sed -i s/lower/upper/ part/src/lib.rs");
    assert_eq!(ground.sh(build), "Compiling part\nCompiling hello\nupper\n");
    ground.remount();
    assert_eq!(ground.sh(build), "upper\n");
    assert_eq!(
        ground.sh(&format!("rm -r project/target; {build}")),
        "Compiling part\nCompiling hello\nupper\n"
    );
    ground.finish();
}
