//! What a verification has found, or a repair has left, in plyd's log.

use super::api;

/// Most lines that one call writes.
const MOST_LINES: usize = 50;

/// Collects what is told of damage and writes it when dropped, a line for each thing, and one for all contents of a layer that were
/// lost together.
#[derive(Debug)]
pub(in crate::grpc) struct DamageLog {
    /// What became of it, with which each line begins.
    what: &'static str,
    /// The first of those that are alike, and how many they are.
    told: Vec<(api::Fault, usize)>,
    /// Of others there is no line.
    more: usize,
}

impl DamageLog {
    /// Nothing was told yet.
    pub(in crate::grpc) fn new(what: &'static str) -> Self {
        Self {
            what,
            told: Vec::new(),
            more: 0,
        }
    }

    pub(in crate::grpc) fn add(&mut self, fault: &api::Fault) {
        let is_like = |first: &api::Fault| {
            !fault.cause.is_empty() && (&first.layer, &first.cause) == (&fault.layer, &fault.cause)
        };
        if let Some((_, number)) = self.told.iter_mut().find(|(first, _)| is_like(first)) {
            *number += 1;
        } else if self.told.len() < MOST_LINES {
            self.told.push((fault.clone(), 1));
        } else {
            self.more += 1;
        }
    }

    fn lines(&self) -> Vec<String> {
        let what = self.what;
        let told = self.told.iter().map(|(first, number)| {
            let whose = match (&*first.layer, &*first.of) {
                ("", "") => String::new(),
                ("", of) => format!("{of}: "),
                (layer, _) => format!("layer {layer}: "),
            };
            let path = match (&*first.path, *number) {
                ("", _) => String::new(),
                (path, 1) => format!("{path}: "),
                (path, _) => format!(", first {path}"),
            };
            let on_top = match &*first.on_top {
                "" => String::new(),
                on_top => format!("; what builds on it: {on_top}"),
            };
            match number {
                1 => format!("{what}: {whose}{path}{}{on_top}", first.problem),
                _ => format!("{what}: {whose}{number} contents {}{path}", first.cause),
            }
        });
        let more = (self.more > 0).then(|| format!("{what}: {} more", self.more));
        told.chain(more).collect()
    }
}

impl Drop for DamageLog {
    fn drop(&mut self) {
        for line in self.lines() {
            tracing::warn!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_together_has_one_line_and_no_call_has_too_many() {
        let mut log = DamageLog::new("verify found");
        let content = |layer: &str, path: &str| api::Fault {
            layer: layer.to_owned(),
            path: path.to_owned(),
            problem: format!("{path} is gone"),
            cause: "are gone with the pack P".to_owned(),
            ..api::Fault::default()
        };
        for number in 0..1000 {
            log.add(&content("a", &format!("/{number}")));
        }
        log.add(&content("b", "/file"));
        let record = api::Fault {
            of: "the image whole".to_owned(),
            problem: "its record R cannot be used".to_owned(),
            ..api::Fault::default()
        };
        log.add(&record);
        assert_eq!(
            log.lines(),
            [
                "verify found: layer a: 1000 contents are gone with the pack P, first /0",
                "verify found: layer b: /file: /file is gone",
                "verify found: the image whole: its record R cannot be used",
            ]
        );
        for _ in 0..MOST_LINES {
            log.add(&record);
        }
        let lines = log.lines();
        assert_eq!(lines.len(), MOST_LINES + 1);
        assert_eq!(lines[MOST_LINES], "verify found: 3 more");
    }
}
