//! A Debian root: apt installs a database server into it, and the database outlives being killed.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Ground, succeed};

/// How long the database may take for what normally takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Binaries of the server; the path names its version.
const PG: &str = "export PATH=$(echo /usr/lib/postgresql/*/bin):$PATH";

/// A command that runs `script` in a chroot of the mounted root, in a process namespace that ends with it.
fn inside(ground: &Ground, script: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--pid", "--fork", "--kill-child", "--", "bash", "-euc"])
        .arg(
            "mount -t proc proc root/proc; mount --rbind /dev root/dev
             exec chroot root /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
                 DEBIAN_FRONTEND=noninteractive bash -euo pipefail -c \"$1\"",
        )
        .args(["bash", script])
        .current_dir(ground.root())
        .stdin(Stdio::null());
    command
}

/// Runs `script` in the root to its end; what it prints.
fn run(ground: &Ground, script: &str) -> String {
    succeed(&mut inside(ground, script), script)
}

/// Runs `script` as the database's user, with a server that is started before and stopped after it.
fn with_server(ground: &Ground, script: &str) -> String {
    run(
        ground,
        &format!(
            "runuser -u postgres -- bash -euo pipefail -c '{PG}; cd /srv/pg
             pg_ctl -D data -l log -w -t 100 start > /dev/null || {{ cat log; exit 1; }}
             {script}
             pg_ctl -D data -m fast -w stop > /dev/null'"
        ),
    )
}

/// A server under load; killed when dropped.
struct Load(Child);

impl Drop for Load {
    /// Not one process of the namespace can do anything more.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn apt_installs_a_database_that_loses_nothing_when_it_is_killed() {
    let mut ground = Ground::new(
        "mmdebstrap --quiet --variant=apt bookworm root
         printf '#!/bin/sh\\nexit 101\\n' > root/usr/sbin/policy-rc.d; chmod 755 root/usr/sbin/policy-rc.d
         [ -e root/etc/resolv.conf ] || cp /etc/resolv.conf root/etc/",
    );
    // Unpacks some thousand files, renames each into its place, and runs scripts of packages.
    run(
        &ground,
        "apt-get -qq update; apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends postgresql",
    );
    // Every file of every package is what its package says.
    assert_eq!(run(&ground, "dpkg --verify; dpkg --audit"), "");
    run(
        &ground,
        &format!(
            "{PG}; install -d -o postgres /srv/pg; cd /srv/pg
             runuser -u postgres -- $(command -v initdb) -D data -A trust > /dev/null
             echo \"listen_addresses = ''\" >> data/postgresql.conf
             echo \"unix_socket_directories = '/srv/pg'\" >> data/postgresql.conf"
        ),
    );
    let psql = "psql -h /srv/pg -qtA -v ON_ERROR_STOP=1 postgres";
    with_server(
        &ground,
        &format!(
            "{psql} -c \"create table seen(i bigint)\"
             pgbench -h /srv/pg -q -i -s 2 postgres 2> /dev/null
             pgbench -h /srv/pg -n -c 4 -j 2 -t 200 postgres > /dev/null 2>&1"
        ),
    );
    for round in 0..3_u64 {
        if round == 2 {
            ground.remount();
        }
        // Each number is noted in /srv/pg/told only after the server has answered that it is committed.
        let script = format!(
            "rm -f /srv/pg/told
             runuser -u postgres -- bash -euo pipefail -c '{PG}; cd /srv/pg
             pg_ctl -D data -l log -w -t 100 start > /dev/null
             pgbench -h /srv/pg -n -c 4 -j 2 -T 1000 postgres > /dev/null 2>&1 &
             i={round}000000; while {psql} -c \"insert into seen values($i)\"; do echo $i >> told; i=$((i + 1)); done'"
        );
        let mut load = Load(
            inside(&ground, &script)
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        );
        let told = ground.root().join("root/srv/pg/told");
        // The kill may have cut the last line off.
        let last = || -> Option<u64> {
            let told = std::fs::read_to_string(&told).ok()?;
            told.rsplit_once('\n')?.0.lines().last()?.parse().ok()
        };
        let deadline = Instant::now() + PATIENCE;
        while last().is_none_or(|last| last < round * 1_000_000 + 20) {
            assert!(load.0.try_wait().unwrap().is_none(), "the load has ended");
            assert!(Instant::now() < deadline, "the database does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(load);
        let last = last().unwrap();
        let found = with_server(
            &ground,
            &format!(
                "{psql} -c \"select count(*) >= {} from seen where i between {round}000000 and {last}\"
                 {psql} -c \"select count(distinct s) from (select sum(abalance) s from pgbench_accounts
                     union all select sum(bbalance) from pgbench_branches union all select sum(tbalance) from pgbench_tellers
                     union all select sum(delta) from pgbench_history) sums\"
                 {psql} -c \"create extension if not exists amcheck\"
                 {psql} -c \"select bt_index_check(oid, true) from pg_class where relkind = \\$\\$i\\$\\$ and relname like \\$\\$pgbench%\\$\\$\"",
                last + 1 - round * 1_000_000
            ),
        );
        assert_eq!(found.trim(), "t\n1", "round {round}: {found}");
    }
    ground.finish();
}
