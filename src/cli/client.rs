//! The way to plyd: its address, and one connection for the life of a command.

use std::error::Error as _;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::error::{Error, Result};
use crate::grpc::pb::plywood::containers_client::ContainersClient;
use crate::grpc::pb::plywood::images_client::ImagesClient;
use crate::grpc::pb::plywood::layers_client::LayersClient;
use crate::grpc::pb::plywood::snapshot_admin_client::SnapshotAdminClient;
use crate::grpc::pb::plywood::system_client::SystemClient;

/// Where plyd listens unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "unix:///run/plywood/plyd.sock";

/// A list of all snapshots of a busy node outgrows gRPC's default of 4 MiB.
const MAX_MESSAGE: usize = 256 << 20;

/// The Unix socket that plyd listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(PathBuf);

impl Address {
    /// Parses `unix:///path`, or a plain absolute path.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let path = bytes
            .strip_prefix(b"unix://")
            .or_else(|| bytes.strip_prefix(b"unix:"))
            .unwrap_or(bytes);
        if path.first() != Some(&b'/') || path.len() < 2 {
            return Err(format!(
                "{text:?} is not an address of plyd: write unix:///path/to/plyd.sock"
            ));
        }
        Ok(Self(PathBuf::from(OsString::from_vec(path.to_vec()))))
    }

    /// What the flag says, else the variable unless it is empty, else the default.
    pub fn choose(flag: Option<Self>, variable: Option<OsString>) -> Result<Self, String> {
        let variable = variable.filter(|text| !text.is_empty());
        match (flag, variable) {
            (Some(flag), _) => Ok(flag),
            (None, Some(text)) => {
                Self::parse(&text).map_err(|problem| format!("PLYWOOD_ADDRESS: {problem}"))
            }
            (None, None) => Self::parse(DEFAULT_ADDRESS.as_ref()),
        }
    }
}

/// One connection to plyd and the services on it.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Connects. Fails at once when nobody listens.
    pub async fn connect(address: &Address) -> Result<Self> {
        let path = address.0.clone();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The host part is never looked up; HTTP wants one.
        let channel = Endpoint::from_static("http://plyd")
            .connect_with_connector(connector)
            .await
            .map_err(|error| Error::Connect {
                path: address.0.clone(),
                source: io_cause(&error),
            })?;
        Ok(Self { channel })
    }

    /// The image service.
    pub fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The container service.
    pub fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The service for packed layers.
    pub fn layers(&self) -> LayersClient<Channel> {
        LayersClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The snapshot service for administrators.
    pub fn snapshots(&self) -> SnapshotAdminClient<Channel> {
        SnapshotAdminClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The system service.
    pub fn system(&self) -> SystemClient<Channel> {
        SystemClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// The I/O error below a transport error; the layers between say nothing more.
fn io_cause(error: &tonic::transport::Error) -> io::Error {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return match io.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(io.kind(), io.to_string()),
            };
        }
        cause = inner.source();
    }
    io::Error::other(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, path) in [
            ("unix:///run/a.sock", Some("/run/a.sock")),
            ("unix:/run/a.sock", Some("/run/a.sock")),
            ("/run/a.sock", Some("/run/a.sock")),
            ("tcp://localhost:1", None),
            ("unix://relative", None),
            ("unix:///", None),
            ("", None),
        ] {
            let address = Address::parse(OsStr::new(text)).ok();
            assert_eq!(address, path.map(|p| Address(p.into())), "{text}");
        }
    }

    #[test]
    fn an_empty_variable_is_none() {
        let address = |path: &str| Address(path.into());
        let choose = |flag: Option<&str>, variable: Option<&str>| {
            Address::choose(flag.map(address), variable.map(OsString::from))
        };
        assert_eq!(choose(Some("/a"), Some("/b")), Ok(address("/a")));
        assert_eq!(choose(Some("/a"), Some("nonsense")), Ok(address("/a")));
        assert_eq!(choose(None, Some("unix:///b")), Ok(address("/b")));
        let default = Ok(address("/run/plywood/plyd.sock"));
        assert_eq!(choose(None, Some("")), default);
        assert_eq!(choose(None, None), default);
        let problem = choose(None, Some("nonsense")).unwrap_err();
        assert!(problem.starts_with("PLYWOOD_ADDRESS: \"nonsense\""));
    }
}
