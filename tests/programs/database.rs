//! SQLite: fcntl locks, shared memory maps, write-ahead log, fsync, a journal that is made and unlinked.

use crate::Ground;

const LOWER: &str = "sqlite3 db 'create table t(i integer primary key, who text, v blob);
     insert into t(who, v) select \"lower\", randomblob(500) from generate_series(1, 2000);'";

/// Four processes write at once; every row of each must be there, in every journal mode.
fn survives_concurrent_writers(journal: &str) {
    let mut ground = Ground::new(LOWER);
    ground.sh(&format!(
        "sqlite3 db 'pragma journal_mode={journal}' > /dev/null
         for who in 1 2 3 4; do
           for i in $(seq 50); do
             echo \"insert into t(who, v) values('$who', randomblob(300));\"
           done | sqlite3 -cmd '.timeout 60000' db & pids+=($!)
         done
         for pid in ${{pids[@]}}; do wait $pid; done"
    ));
    let look = "sqlite3 db 'pragma integrity_check; select who, count(*) from t group by who;'";
    let expected = "ok\n1|50\n2|50\n3|50\n4|50\nlower|2000\n";
    assert_eq!(ground.sh(look), expected);
    ground.remount();
    assert_eq!(ground.sh(look), expected);
    ground
        .sh("sqlite3 db 'delete from t where i % 2; vacuum; pragma integrity_check' | grep -qx ok");
    ground.finish();
}

#[test]
fn sqlite_with_a_write_ahead_log_loses_no_row() {
    survives_concurrent_writers("wal");
}

#[test]
fn sqlite_with_a_rollback_journal_loses_no_row() {
    survives_concurrent_writers("delete");
}
