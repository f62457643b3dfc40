//! Generates the control messages from `proto/`; needs no `protoc` on the machine.

use std::io::Result;

fn main() -> Result<()> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto");
    println!("cargo:rerun-if-changed={root}");
    let files = protox::compile([format!("{root}/ebbtide/v1/control.proto")], [root])
        .map_err(std::io::Error::other)?;
    prost_build::Config::new().compile_fds(files)
}
