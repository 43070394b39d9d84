//! `snapctl system df`.

use serde::Serialize;

use super::DfArgs;
use crate::cli::client::Client;
use crate::cli::error::{Error, Result};
use crate::cli::output::{self, or_dash, size};
use crate::grpc::pb::plywood::{DiskUsageRequest, DiskUser};

#[derive(Serialize)]
struct UsageView {
    total: u64,
    users: Vec<UserView>,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct UserView {
    kind: String,
    name: Option<String>,
    owner: Option<String>,
    /// Of images and snapshots.
    logical: Option<u64>,
    unique: Option<u64>,
    on_disk: Option<u64>,
}

impl From<DiskUser> for UserView {
    fn from(user: DiskUser) -> Self {
        let known = |text: String| (!text.is_empty()).then_some(text);
        Self {
            name: known(user.name),
            owner: known(user.owner),
            logical: user.logical,
            unique: user.unique,
            on_disk: user.on_disk,
            kind: user.kind,
        }
    }
}

pub(super) async fn df(args: DfArgs, client: &Client) -> Result<()> {
    let usage = client.system().disk_usage(DiskUsageRequest {}).await?;
    let usage = usage.into_inner();
    let view = UsageView {
        total: usage.total,
        users: usage.users.into_iter().map(UserView::from).collect(),
        problems: usage.problems,
    };
    if args.json {
        output::json(&view)?;
    } else if args.quiet {
        output::lines_out(&[view.total.to_string()])?;
    } else {
        table(&view, &args)?;
    }
    if view.problems.is_empty() {
        return Ok(());
    }
    for problem in &view.problems {
        output::note(&format!("snapctl: {problem}"));
    }
    output::note(
        "snapctl: what hangs on that is not known; `snapctl system repair` mends it, or says what to do",
    );
    Err(Error::Reported)
}

fn table(view: &UsageView, args: &DfArgs) -> Result<()> {
    let bytes = |bytes: Option<u64>, unknown: &str| bytes.map_or_else(|| unknown.to_owned(), size);
    let rows = view.users.iter().map(|user| {
        let has_tree = matches!(user.kind.as_str(), "image" | "snapshot" | "container");
        let no_tree = if has_tree { "?" } else { "-" };
        vec![
            user.kind.clone(),
            or_dash(&args.cut.digests(user.name.as_deref().unwrap_or_default())),
            bytes(user.logical, no_tree),
            bytes(user.unique, no_tree),
            bytes(user.on_disk, "?"),
        ]
    });
    let dash = || "-".to_owned();
    let total = vec!["total".to_owned(), dash(), dash(), dash(), size(view.total)];
    output::table(
        &["KIND", "NAME", "LOGICAL", "UNIQUE", "ON DISK"],
        rows.chain([total]),
    )
}
