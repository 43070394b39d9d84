//! The code that `build.rs` generates from `proto/`.
#![allow(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    unused_qualifications,
    reason = "generated; the comments are in the .proto files"
)]

/// `containerd.*`: containerd's API, as its clients speak it.
pub mod containerd {
    /// `containerd.types`.
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    /// `containerd.services`.
    pub mod services {
        /// `containerd.services.content.v1`.
        pub mod content {
            /// `containerd.services.content.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.content.v1");
            }
        }
        /// `containerd.services.diff.v1`.
        pub mod diff {
            /// `containerd.services.diff.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.diff.v1");
            }
        }
        /// `containerd.services.leases.v1`.
        pub mod leases {
            /// `containerd.services.leases.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.leases.v1");
            }
        }
        /// `containerd.services.snapshots.v1`.
        pub mod snapshots {
            /// `containerd.services.snapshots.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}

/// `plywood.v1`: our own services.
pub mod plywood {
    tonic::include_proto!("plywood.v1");
}

/// The descriptors of all of the above, for the reflection service.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
