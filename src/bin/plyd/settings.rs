//! What plyd is told: the command line and the configuration file.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use plywood::store::ingest::Settings as Packing;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::packing::{self, Size, WhenVerified};

const DEFAULT_CONFIG: &str = "/etc/plywood/config.toml";
const DEFAULT_ADDRESS: &str = "unix:///run/plywood/plyd.sock";
const DEFAULT_CONTAINERD: &str = "unix:///run/containerd/containerd.sock";

/// Keeps container root file systems and serves them to containerd and snapctl.
///
/// Every option but --config can also stand in the configuration file, with "_" for "-"; the command
/// line wins.
#[derive(Debug, Parser)]
#[command(name = "plyd", version, max_term_width = 100)]
pub struct Args {
    /// Configuration file [default: /etc/plywood/config.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
}

#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Directory of everything that lasts [default: /var/lib/plywood]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Directory of everything that a reboot ends; best on a tmpfs [default: /run/plywood]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Socket to serve on [default: unix:///run/plywood/plyd.sock]
    #[arg(long, value_name = "unix://PATH")]
    pub address: Option<String>,
    /// What to log: error, warn, info, debug, trace, or a list such as info,plywood::snapshotter=debug
    /// [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How to log, to standard error [default: text]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// The plyfs program [default: beside plyd, then on PATH]
    #[arg(long, value_name = "FILE")]
    pub plyfs: Option<PathBuf>,
    /// The plyshim program [default: beside plyd, then on PATH]
    #[arg(long, value_name = "FILE")]
    pub plyshim: Option<PathBuf>,
    /// The OCI runtime [default: the first of runc and crun that works here]
    #[arg(long, value_name = "FILE")]
    pub oci_runtime: Option<PathBuf>,
    /// containerd's socket, where the diff service reads and writes layers
    /// [default: unix:///run/containerd/containerd.sock]
    #[arg(long, value_name = "unix://PATH")]
    pub containerd_address: Option<String>,
    /// When contents of packed layers are compared with their names [default: first]
    #[arg(long, value_enum, value_name = "WHEN")]
    pub verify: Option<WhenVerified>,
    /// Memory for a layer that is being taken in: its contents, and the window of zstd [default: 256M]
    #[arg(long, value_name = "BYTES")]
    pub import_memory: Option<Size>,
    /// Threads that hash and compress the contents of a layer [default: one for each CPU]
    #[arg(long, value_name = "NUMBER")]
    pub import_workers: Option<u64>,
    /// Contents of more bytes become files of their own, all others are packed [default: 128K]
    #[arg(long, value_name = "BYTES")]
    pub small_object_limit: Option<Size>,
    /// Whether those files are compressed, or plain for mounts that pass them through [default: compressed]
    #[arg(long, value_enum, value_name = "HOW")]
    pub large_objects: Option<LargeObjects>,
    /// How much what is packed is compressed, 1 to 22 [default: 1]
    #[arg(long, value_name = "LEVEL")]
    pub zstd_level: Option<i64>,
    /// Most bytes of a layer, uncompressed [default: 1T]
    #[arg(long, value_name = "BYTES")]
    pub layer_max_bytes: Option<Size>,
    /// Most entries of a layer [default: 10000000]
    #[arg(long, value_name = "NUMBER")]
    pub layer_max_entries: Option<u64>,
    /// Most bytes of names, link targets, extended attributes and maps of a layer [default: 512M]
    #[arg(long, value_name = "BYTES")]
    pub layer_max_names: Option<Size>,
    /// Most bytes of a file of a layer, its holes included [default: as many as Linux knows, 8 EiB less one]
    #[arg(long, value_name = "BYTES")]
    pub layer_max_file: Option<Size>,
    /// Most bytes of a path in a layer [default: 4095]
    #[arg(long, value_name = "BYTES")]
    pub layer_max_path: Option<Size>,
    /// Most bytes of an extended attribute of a layer [default: 64K]
    #[arg(long, value_name = "BYTES")]
    pub layer_max_xattr: Option<Size>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object a line
    Json,
    /// For people
    #[default]
    Text,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LargeObjects {
    /// In frames that can be read one by one
    #[default]
    Compressed,
    /// As they are, so that the kernel can read them by itself
    Plain,
}

/// Settings of which nothing is wrong in itself.
pub struct Checked {
    pub settings: Settings,
    pub log_filter: EnvFilter,
    pub socket: PathBuf,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// How layers are packed.
    pub packing: Packing,
}

impl Settings {
    fn or(self, other: Self) -> Self {
        Self {
            root: self.root.or(other.root),
            state: self.state.or(other.state),
            address: self.address.or(other.address),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
            plyfs: self.plyfs.or(other.plyfs),
            plyshim: self.plyshim.or(other.plyshim),
            oci_runtime: self.oci_runtime.or(other.oci_runtime),
            containerd_address: self.containerd_address.or(other.containerd_address),
            verify: self.verify.or(other.verify),
            import_memory: self.import_memory.or(other.import_memory),
            import_workers: self.import_workers.or(other.import_workers),
            small_object_limit: self.small_object_limit.or(other.small_object_limit),
            large_objects: self.large_objects.or(other.large_objects),
            zstd_level: self.zstd_level.or(other.zstd_level),
            layer_max_bytes: self.layer_max_bytes.or(other.layer_max_bytes),
            layer_max_entries: self.layer_max_entries.or(other.layer_max_entries),
            layer_max_names: self.layer_max_names.or(other.layer_max_names),
            layer_max_file: self.layer_max_file.or(other.layer_max_file),
            layer_max_path: self.layer_max_path.or(other.layer_max_path),
            layer_max_xattr: self.layer_max_xattr.or(other.layer_max_xattr),
        }
    }
}

/// Reads the command line and the configuration file.
pub fn read(args: Args) -> Result<Checked, String> {
    let path = args.config.as_deref();
    let path_or_default = path.unwrap_or(Path::new(DEFAULT_CONFIG));
    let text = match std::fs::read_to_string(path_or_default) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_none() => String::new(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(format!(
                "there is no configuration file {}; name one that is there with --config, or leave that out, for every key has a default",
                path_or_default.display()
            ));
        }
        Err(error) => {
            return Err(format!(
                "cannot read the configuration file {}: {error}; name a file that root may read with --config",
                path_or_default.display()
            ));
        }
    };
    let file: Settings =
        toml::from_str(&text).map_err(|error| wrong(path_or_default, &text, &error))?;
    let settings = args.settings.or(file);
    let address = settings.address.as_deref().unwrap_or(DEFAULT_ADDRESS);
    let containerd = settings.containerd_address.as_deref();
    let containerd = containerd.unwrap_or(DEFAULT_CONTAINERD);
    Ok(Checked {
        log_filter: log_filter(settings.log_level.as_deref().unwrap_or("info"))?,
        socket: socket_path("--address", address)?,
        containerd: socket_path("--containerd-address", containerd)?,
        packing: packing::packing(&settings)?,
        settings,
    })
}

/// What is wrong with the text of a configuration file, on one line.
fn wrong(path: &Path, text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let line = before.map_or(String::new(), |before| {
        let number = before.matches('\n').count();
        let line = text.lines().nth(number).unwrap_or_default().trim();
        format!(" in line {}, `{line}`", number + 1)
    });
    let problem: Vec<_> = error.message().split_whitespace().collect();
    format!("{} is wrong{line}: {}", path.display(), problem.join(" "))
}

/// Reads `--log-level`.
fn log_filter(level: &str) -> Result<EnvFilter, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("the log level {level:?} is wrong: {why}");
    // EnvFilter takes a bare word for the name of a module and is then silent about all others.
    let is_level = |word: &str| word.trim().parse::<LevelFilter>().is_ok();
    if let Some(word) = level
        .split(',')
        .find(|word| !level.contains('[') && !word.contains('=') && !is_level(word))
    {
        let why = format!("{word:?} is none of error, warn, info, debug, trace and off");
        return Err(wrong(&why));
    }
    EnvFilter::try_new(level).map_err(|error| wrong(&error))
}

fn socket_path(option: &str, address: &str) -> Result<PathBuf, String> {
    /// Bytes that the kernel has room for (unix(7)), without the zero at the end.
    const LONGEST: usize = 107;
    let path = address.strip_prefix("unix://").map(Path::new);
    let path = path.filter(|path| path.is_absolute()).ok_or_else(|| {
        format!("the address {address:?} is wrong: write unix:// and an absolute path")
    })?;
    let length = path.as_os_str().len();
    if length > LONGEST {
        return Err(format!(
            "the path in the address {address:?} has {length} bytes, and that of a socket has {LONGEST} at most; give a shorter one with {option}"
        ));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let longest = format!("/{}", "x".repeat(106));
        let path = socket_path("--address", &format!("unix://{longest}")).unwrap();
        assert_eq!(path, Path::new(&longest));
        for (address, words) in [
            ("/run/s", "write unix://"),
            ("unix://s", "write unix://"),
            (&*format!("unix://{longest}x"), "has 108 bytes"),
        ] {
            let problem = socket_path("--address", address).unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
    }

    #[test]
    fn a_wrong_line_of_the_file_is_told_on_one_line() {
        let text = "root = \"/r\"\nrot = 1\n";
        let error = toml::from_str::<Settings>(text).unwrap_err();
        let told = wrong(Path::new("/c"), text, &error);
        assert!(
            told.starts_with("/c is wrong in line 2, `rot = 1`: unknown field `rot`"),
            "{told}"
        );
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}
