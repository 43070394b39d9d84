//! The signals that snapctl passes on to the process it runs, instead of dying of them.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::error::{Error, Result};

/// Names and numbers of what is passed on. SIGKILL and SIGSTOP cannot be caught; SIGTSTP, SIGTTIN and
/// SIGTTOU are about our own terminal.
const FORWARDED: [(&str, i32); 6] = [
    ("SIGHUP", libc::SIGHUP),
    ("SIGINT", libc::SIGINT),
    ("SIGQUIT", libc::SIGQUIT),
    ("SIGTERM", libc::SIGTERM),
    ("SIGUSR1", libc::SIGUSR1),
    ("SIGUSR2", libc::SIGUSR2),
];

/// After so many requests to end we end, whatever the process does.
const PATIENCE: u32 = 3;

/// A signal that snapctl got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// E.g. `SIGINT`.
    pub name: &'static str,
    /// E.g. 2.
    pub number: u8,
}

/// From its creation on, the signals that snapctl gets; the process no longer dies of them.
pub struct Signals {
    from: mpsc::UnboundedReceiver<Signal>,
    asked_to_end: u32,
}

impl Signals {
    /// Begins to catch signals.
    pub fn catch() -> Result<Self> {
        let (to, from) = mpsc::unbounded_channel();
        for (name, number) in FORWARDED {
            let mut listener =
                signal(SignalKind::from_raw(number)).map_err(|source| Error::Stdio {
                    action: "catch signals",
                    source,
                })?;
            let to = to.clone();
            let number = u8::try_from(number).unwrap_or_default();
            tokio::spawn(async move {
                while listener.recv().await.is_some() && to.send(Signal { name, number }).is_ok() {}
            });
        }
        Ok(Self {
            from,
            asked_to_end: 0,
        })
    }

    /// The next signal to pass on. An error when the user insists on an end.
    pub async fn next(&mut self) -> Result<Signal, Signal> {
        match self.from.recv().await {
            Some(signal) => {
                if matches!(signal.name, "SIGINT" | "SIGTERM") {
                    self.asked_to_end += 1;
                }
                if self.asked_to_end >= PATIENCE {
                    Err(signal)
                } else {
                    Ok(signal)
                }
            }
            // The senders live as long as the runtime.
            None => std::future::pending().await,
        }
    }

    /// Waits for `work`; the first signal ends the wait with an error that says `message`.
    pub async fn interrupt<T>(
        &mut self,
        work: impl Future<Output = Result<T>>,
        message: &str,
    ) -> Result<T> {
        tokio::select! {
            done = work => done,
            signal = self.from.recv() => Err(Error::Interrupted {
                message: message.to_owned(),
                signal: signal.map_or(0, |signal| signal.number),
            }),
        }
    }
}
