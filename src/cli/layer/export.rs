//! `snapctl layer export`.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use nix::unistd::geteuid;

use super::ExportArgs;
use crate::cli::client::Client;
use crate::cli::error::{Error, Result};
use crate::cli::signals::Signals;
use crate::grpc::pb::plywood::ExportLayerRequest;
use crate::grpc::pb::plywood::export_layer_response::Part;

pub(super) async fn export(args: ExportArgs, client: &Client) -> Result<()> {
    let mut target = Target::open(&args.output)?;
    let mut signals = Signals::catch()?;
    // Shown on a terminal only, and not where it would mix with the stream.
    let bar = match args.quiet || matches!(target, Target::Stdout) {
        true => ProgressBar::hidden(),
        false => ProgressBar::new(0).with_style(style()),
    };
    let copied = copy(&args.layer, client, &mut target, &bar);
    let copied = signals.interrupt(copied, "interrupted; nothing was kept of the layer");
    let copied = copied.await;
    bar.finish_and_clear();
    copied.and_then(|()| target.keep())
}

async fn copy(layer: &str, client: &Client, target: &mut Target, bar: &ProgressBar) -> Result<()> {
    let request = ExportLayerRequest {
        r#ref: layer.to_owned(),
    };
    let mut parts = client.layers().export(request).await?.into_inner();
    let mut begun = false;
    while let Some(message) = parts.message().await? {
        match message.part {
            Some(Part::Layer(layer)) => {
                begun = true;
                bar.set_length(layer.tar_bytes);
            }
            Some(Part::Data(data)) => {
                target.write(&data)?;
                bar.inc(data.len() as u64);
            }
            None => {}
        }
    }
    if begun {
        Ok(())
    } else {
        Err(Error::Protocol("exporting the layer"))
    }
}

fn style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}");
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Where the stream goes.
enum Target {
    Stdout,
    /// A device or a pipe, which is there already.
    Special(PathBuf, File),
    /// A file beside the one that it will be. Dropped before, it is removed.
    File {
        to: PathBuf,
        partial: PathBuf,
        file: File,
    },
}

impl Target {
    fn open(path: &Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            if io::stdout().is_terminal() {
                return Err(Error::Input(
                    "stdout is a terminal: name a file with -o FILE, or pipe the stream on"
                        .to_owned(),
                ));
            }
            return Ok(Self::Stdout);
        }
        // What a link leads to is replaced, not the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let replaced = fs::metadata(&path).ok();
        if replaced.as_ref().is_some_and(|found| !found.is_file()) {
            let file = OpenOptions::new().write(true).open(&path);
            let file = file.map_err(failed("open", &path))?;
            return Ok(Self::Special(path, file));
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{:08x}.partial", rand::random::<u32>()));
        let partial = path.with_file_name(name);
        // What another user has said of a file is no permission to use one of the caller's, least of all as its owner.
        let kept = replaced
            .filter(|replaced| replaced.uid() == geteuid().as_raw())
            .map(|replaced| Permissions::from_mode(replaced.mode() & 0o777));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            // Nobody can read it before it has the permissions of what it replaces.
            .mode(if kept.is_some() { 0o600 } else { 0o666 })
            .open(&partial)
            .map_err(failed("make", &path))?;
        if let Some(kept) = kept
            && let Err(error) = file.set_permissions(kept)
        {
            // It has not become anybody's to remove.
            let _ = fs::remove_file(&partial);
            return Err(failed("set the permissions of", &partial)(error));
        }
        Ok(Self::File {
            to: path,
            partial,
            file,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Stdout => crate::cli::output::bytes_out(bytes),
            Self::Special(path, file) => file.write_all(bytes).map_err(failed("write", path)),
            Self::File { to, file, .. } => file.write_all(bytes).map_err(failed("write", to)),
        }
    }

    /// The stream is whole.
    fn keep(self) -> Result<()> {
        if let Self::File { to, partial, .. } = &self {
            fs::rename(partial, to).map_err(failed("make", to))?;
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Self::File { partial, .. } = self {
            // Gone if it was kept.
            let _ = fs::remove_file(partial);
        }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    /// The mode of what an export makes of a file of the mode `mode`.
    fn exported(path: &Path, mode: u32, owner: Option<u32>) -> u32 {
        File::create(path).unwrap();
        chown(path, owner, None).unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        Target::open(path).unwrap().keep().unwrap();
        assert_eq!(fs::metadata(path).unwrap().uid(), geteuid().as_raw());
        mode_of(path)
    }

    /// A user once got a setuid file of root's by putting one of its own in the place that root exports to.
    #[test]
    fn only_permissions_that_the_caller_gave_are_kept() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("layer.tar");
        Target::open(&path).unwrap().keep().unwrap();
        let new = mode_of(&path);
        assert_eq!(exported(&path, 0o600, None), 0o600);
        assert_eq!(exported(&path, 0o6755, None), 0o755);
        for theirs in [0o6755, 0o666, 0o600] {
            assert_eq!(exported(&path, theirs, Some(1000)), new, "{theirs:o}");
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }
}
