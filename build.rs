//! Generates the gRPC code from `proto/` with a compiler written in Rust, so that no `protoc` is needed.

use std::path::PathBuf;

/// What plyd offers.
const SERVED: &[&str] = &[
    "github.com/containerd/containerd/api/services/diff/v1/diff.proto",
    "github.com/containerd/containerd/api/services/snapshots/v1/snapshots.proto",
    "plywood/v1/container.proto",
    "plywood/v1/image.proto",
    "plywood/v1/layer.proto",
    "plywood/v1/snapshot.proto",
    "plywood/v1/system.proto",
];

/// What plyd asks of others.
const ASKED: &[&str] = &[
    "github.com/containerd/containerd/api/services/content/v1/content.proto",
    "github.com/containerd/containerd/api/services/leases/v1/leases.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files(SERVED)?;
    // The bytes that the reflection service serves; source info would only make them large.
    std::fs::write(
        out.join("descriptors.bin"),
        compiler.encode_file_descriptor_set(),
    )?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    let asked = protox::compile(ASKED, ["proto"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(asked)?;
    Ok(())
}
