//! What `system verify` and `repair` say of what is damaged.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::cli::output::{count, printable, short};
use crate::grpc::pb::plywood::Fault;

#[derive(Serialize)]
pub(super) struct FaultView {
    pub(super) layer: String,
    path: Option<String>,
    problem: String,
    cause: Option<String>,
    snapshots: Vec<String>,
    kind: String,
    of: Option<String>,
    file: Option<String>,
    layers: Vec<String>,
    images: Vec<String>,
    advice: Option<String>,
    newer: bool,
    on_top: Option<String>,
}

impl From<Fault> for FaultView {
    fn from(fault: Fault) -> Self {
        let known = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            layer: fault.layer,
            path: known(fault.path),
            problem: fault.problem,
            cause: known(fault.cause),
            snapshots: fault.snapshots,
            kind: fault.kind,
            of: known(fault.of),
            file: known(fault.file),
            layers: fault.layers,
            images: fault.images,
            advice: known(fault.advice),
            newer: fault.newer,
            on_top: known(fault.on_top),
        }
    }
}

impl FaultView {
    /// Whether both are contents of one layer that were lost together.
    fn is_like(&self, other: &Self) -> bool {
        self.cause.is_some() && (&self.layer, &self.cause) == (&other.layer, &other.cause)
    }

    /// What names it: a layer, or else a file, or else the snapshot that is mounted.
    fn name(&self) -> &str {
        let name = match &*self.layer {
            "" => self
                .file
                .as_deref()
                .or(self.snapshots.first().map(String::as_str)),
            layer => Some(layer),
        };
        // The index of names.
        name.or(self.of.as_deref()).unwrap_or(&self.kind)
    }

    /// What is wrong with what, of this and of others that are like it, `number` in all, and what to do.
    fn line(&self, number: usize) -> String {
        let what = match (&self.cause, self.kind.as_str()) {
            (Some(cause), _) if number > 1 => {
                let first = self.path.iter().map(|path| format!(", first {path}"));
                format!("{number} contents {cause}{}", first.collect::<String>())
            }
            // A record names itself.
            (_, "record") => self.problem.clone(),
            _ if self.layer.is_empty() => self.problem.clone(),
            _ => {
                let path = self.path.as_deref().unwrap_or("the layer itself");
                format!("{path}: {}", self.problem)
            }
        };
        let whose = match (&*self.layer, &self.of) {
            ("", None) => String::new(),
            ("", Some(of)) => format!("{of}: "),
            (layer, _) => format!("layer {}{}: ", short(layer), self.users()),
        };
        let on_top = self.on_top.iter();
        let on_top = on_top.map(|on_top| format!("; what builds on it: {on_top}"));
        let advice = self.advice.iter().map(|advice| format!("; {advice}"));
        let rest: String = on_top.chain(advice).collect();
        printable(&format!("{whose}{what}{rest}"))
    }

    /// Who needs the layer.
    fn users(&self) -> String {
        let images = self.images.iter().map(|image| format!("image {image}"));
        let users: Vec<String> = self.snapshots.iter().cloned().chain(images).collect();
        match users.is_empty() {
            true => String::new(),
            false => format!(" (of {})", users.join(", ")),
        }
    }
}

/// A line for each fault, and one for all contents of a layer that were lost together.
pub(super) fn lines(faults: &[FaultView]) -> Vec<String> {
    let mut told: Vec<(&FaultView, usize)> = Vec::new();
    for fault in faults {
        match told.iter_mut().find(|(first, _)| first.is_like(fault)) {
            Some((_, number)) => *number += 1,
            None => told.push((fault, 1)),
        }
    }
    let lines = told.into_iter().map(|(first, number)| first.line(number));
    lines.collect()
}

/// What names each thing that is damaged, once, in order.
pub(super) fn names(faults: &[FaultView]) -> Vec<String> {
    let names: BTreeSet<_> = faults.iter().map(|fault| printable(fault.name())).collect();
    names.into_iter().collect()
}

/// What can be done about what was found, in words that follow that; empty for nothing.
pub(super) fn remedy(faults: &[FaultView]) -> String {
    let newer = faults.iter().filter(|fault| fault.newer).count();
    let mounts = faults.iter().filter(|fault| fault.kind == "mount").count();
    let repair = "`snapctl system repair` mends what it can, and says what to do about the rest";
    let parts = [
        (faults.len() > newer + mounts).then_some(repair),
        (mounts > 0).then_some("what has to be mounted again no repair can mend"),
        (newer > 0).then_some("what a newer release of Plywood wrote is left to that"),
    ];
    let parts = parts.into_iter().flatten();
    parts.map(|part| format!("; {part}")).collect()
}

/// How many of what there are, as `2 contents of 1 layer, 1 record`; `0` for none.
pub(super) fn sum(faults: &[FaultView]) -> String {
    let of_kind = |kind| faults.iter().filter(move |fault| fault.kind == kind);
    let layers_of = |kind| {
        let layers: BTreeSet<_> = of_kind(kind).map(|fault| &*fault.layer).collect();
        layers.len() as u64
    };
    let kinds = [
        ("pack", "pack"),
        ("view", "merged view"),
        ("record", "record"),
        ("index", "index of names"),
        ("mount", "mount"),
    ];
    let mut parts = Vec::new();
    let contents = of_kind("content").count() as u64;
    if contents > 0 {
        let layers = count(layers_of("content"), "layer");
        parts.push(format!("{} of {layers}", count(contents, "content")));
    }
    if layers_of("layer") > 0 {
        // Its index and its recipe may both be damaged.
        parts.push(count(layers_of("layer"), "layer"));
    }
    for (kind, what) in kinds {
        match of_kind(kind).count() as u64 {
            0 => {}
            number => parts.push(count(number, what)),
        }
    }
    match parts.is_empty() {
        true => "0".to_owned(),
        false => parts.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(layer: &str, path: &str, cause: &str) -> FaultView {
        Fault {
            kind: "content".to_owned(),
            layer: layer.to_owned(),
            path: path.to_owned(),
            problem: format!("cannot open the file of {path}"),
            cause: cause.to_owned(),
            advice: "mend it".to_owned(),
            snapshots: vec!["work".to_owned()],
            images: vec!["debian".to_owned()],
            ..Fault::default()
        }
        .into()
    }

    fn of_kind(kind: &str, layer: &str) -> FaultView {
        Fault {
            kind: kind.to_owned(),
            layer: layer.to_owned(),
            problem: "it is gone".to_owned(),
            ..Fault::default()
        }
        .into()
    }

    /// A pack that was lost was told by a line for each of 899 contents.
    #[test]
    fn contents_of_a_layer_that_were_lost_together_have_one_line() {
        let (one, two) = ("a".repeat(64), "b".repeat(64));
        let gone = "are gone with the pack P";
        let faults = [
            content(&one, "/first", gone),
            content(&one, "/second", gone),
            content(&one, "/other", "in the pack Q are damaged"),
            content(&two, "/third", gone),
            content(&one, "/fourth", gone),
        ];
        let of = |layer: &str| format!("layer {} (of work, image debian): ", &layer[..12]);
        assert_eq!(
            lines(&faults),
            [
                format!(
                    "{}3 contents are gone with the pack P, first /first; mend it",
                    of(&one)
                ),
                format!(
                    "{}/other: cannot open the file of /other; mend it",
                    of(&one)
                ),
                format!(
                    "{}/third: cannot open the file of /third; mend it",
                    of(&two)
                ),
            ]
        );
        assert_eq!(sum(&faults), "5 contents of 2 layers");
    }

    #[test]
    fn the_sum_says_what_is_damaged() {
        assert_eq!(sum(&[]), "0");
        let faults = [
            of_kind("record", "a"),
            of_kind("view", ""),
            of_kind("layer", "a"),
            of_kind("layer", "a"),
            of_kind("record", ""),
            of_kind("mount", ""),
        ];
        assert_eq!(sum(&faults), "1 layer, 1 merged view, 2 records, 1 mount");
        assert_eq!(lines(&faults[..2]), ["layer a: it is gone", "it is gone"]);
    }

    /// Nothing was printed of views, records and packs.
    #[test]
    fn everything_has_a_name() {
        let fault = |kind: &str, layer: &str, file: &str, snapshot: &str| {
            FaultView::from(Fault {
                kind: kind.to_owned(),
                layer: layer.to_owned(),
                file: file.to_owned(),
                snapshots: vec![snapshot.to_owned()],
                ..Fault::default()
            })
        };
        let faults = [
            fault("record", "b", "/records/b", "work"),
            fault("content", "a", "", "work"),
            fault("content", "a", "", "work"),
            fault("view", "", "/views/one", "work"),
            fault("mount", "", "", "work"),
            of_kind("index", ""),
        ];
        assert_eq!(names(&faults), ["/views/one", "a", "b", "index", "work"]);
        assert_eq!(names(&[]), [""; 0]);
    }

    /// A repair was said to mend what it leaves to another release, and what has to be mounted again.
    #[test]
    fn a_repair_is_said_to_mend_only_what_it_does() {
        let fault = |kind: &str, newer| {
            FaultView::from(Fault {
                kind: kind.to_owned(),
                newer,
                ..Fault::default()
            })
        };
        let told = |faults: &[FaultView]| {
            let told = remedy(faults);
            ["mends what it can", "mounted again", "newer release"].map(|word| told.contains(word))
        };
        let view = || fault("view", false);
        let (mount, newer) = (|| fault("mount", false), || fault("record", true));
        assert_eq!(remedy(&[]), "");
        assert_eq!(told(&[view()]), [true, false, false]);
        assert_eq!(told(&[mount()]), [false, true, false]);
        assert_eq!(told(&[newer(), newer()]), [false, false, true]);
        assert_eq!(told(&[newer(), view(), mount()]), [true; 3]);
    }
}
