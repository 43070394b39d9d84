//! Where a `plyfs` process logs: standard error in front, a file, or the system log.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// The place for log lines.
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// A file, appended to.
    File(File),
    /// `/dev/log`; lines are dropped while nobody listens there.
    Syslog,
}

/// Starts logging for the whole process. `debug`: everything, each request of the kernel included;
/// otherwise the variable `PLYFS_LOG` may choose, and what an administrator should know is logged.
pub fn start(target: LogTarget, debug: bool) {
    let filter = if debug {
        EnvFilter::new("debug")
    } else {
        EnvFilter::try_from_env("PLYFS_LOG").unwrap_or_else(|_| EnvFilter::new("info,fuser=warn"))
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false);
    // A second start, as in a test, leaves the first one in place.
    let _ = match target {
        LogTarget::Stderr => builder.with_writer(io::stderr).try_init(),
        LogTarget::File(file) => builder.with_writer(Arc::new(file)).try_init(),
        LogTarget::Syslog => builder
            .without_time()
            .with_level(false)
            .with_writer(Syslog)
            .try_init(),
    };
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "a defect in plyfs"),
    ));
}

/// The system log, in the old format of RFC 3164 that every daemon behind `/dev/log` reads.
struct Syslog;

/// Facility "daemon", shifted as the priority wants it.
const DAEMON: u8 = 3 << 3;

struct SyslogLine {
    severity: u8,
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = SyslogLine;

    fn make_writer(&'a self) -> SyslogLine {
        SyslogLine { severity: 6 }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> SyslogLine {
        let severity = match *metadata.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        SyslogLine { severity }
    }
}

impl SyslogLine {
    fn send(&self, line: &[u8]) -> io::Result<()> {
        let mut message = format!(
            "<{}>plyfs[{}]: ",
            DAEMON | self.severity,
            std::process::id()
        )
        .into_bytes();
        message.extend_from_slice(line.trim_ascii_end());
        let socket = UnixDatagram::unbound()?;
        // A system log that does not read must not stop the file system.
        socket.set_nonblocking(true)?;
        socket.send_to(&message, "/dev/log")?;
        Ok(())
    }
}

impl Write for SyslogLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // A host without a system log drops the line; there is nobody left to tell.
        let _ = self.send(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
