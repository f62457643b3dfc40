//! What the fuzz targets run. `native/core/tests/fuzz_harness.rs` runs the same without libFuzzer.

pub mod harness;
