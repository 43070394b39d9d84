//! git on a repository that lies in the lower: thousands of small files, renames over existing ones,
//! read-only objects, memory maps of packs.

use crate::Ground;

#[test]
fn git_commits_repacks_and_checks_a_lower_repository() {
    let mut ground = Ground::new(
        "git init -q -b main repo; cd repo
         for i in $(seq 200); do mkdir -p d$((i % 10)); seq $i $((i * 3)) > d$((i % 10))/f$i; done
         git add .; git commit -qm first
         for i in $(seq 20); do echo $i >> d1/f1; git commit -qam \"change $i\"; done",
    );
    let status = ground.sh("cd repo; git status --porcelain");
    assert_eq!(status, "", "an untouched checkout is clean");
    ground.sh("cd repo
         git checkout -q -b topic HEAD~5; echo x > d2/new; git mv d3 moved; git rm -qr d4; git add .
         git commit -qm topic; git checkout -q main; git merge -q -m merge topic
         git gc -q --aggressive --prune=now; git fsck --full --strict
         git clone -q . ../clone; git -C ../clone fsck --full");
    let seen = ground
        .sh("cd repo; git log --format=%H%d; git status --porcelain; git ls-files -s | md5sum");
    ground.remount();
    let again = ground.sh(
        "cd repo; git fsck --full >&2; git log --format=%H%d; git status --porcelain; git ls-files -s | md5sum",
    );
    assert_eq!(seen, again);
    assert_eq!(
        ground.sh("cd repo; git stash -q || true; git checkout -q main~1; git status --porcelain"),
        ""
    );
    ground.finish();
}
