//! What plyd keeps of a container. It exists if and only if its record does.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::store::record::Record;

/// A container, as it was created; nothing of it changes later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its name.
    pub name: String,
    /// The reference that it was created from.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// When it was created.
    pub created: SystemTime,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Who its processes run as, as it was asked for.
    pub user: String,
    /// It has a terminal.
    pub tty: bool,
    /// Its standard input can be attached to.
    pub open_stdin: bool,
    /// It is removed when it ends.
    pub auto_remove: bool,
    /// Who created it was about to start it.
    #[serde(default)]
    pub starts_next: bool,
    /// It shares the host's network.
    pub host_network: bool,
    /// Its host name.
    pub hostname: String,
    /// Number of the signal that asks it to end.
    pub stop_signal: i32,
}

impl Record for ContainerRecord {
    const KIND: &'static str = "container";
    const VERSION: u32 = 1;
    const REMEDY: &'static str = "restore it from a backup and run `snapctl system repair`, or delete the file to give the container up and start plyd again";
}
