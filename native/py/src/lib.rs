//! `ebbtide._native`: registers what `native/core` offers to Python, converts errors, and lets go of
//! the GIL around everything that can take more than about 10 us. Nothing else.

mod directory;
mod errors;
mod log;
mod position;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use super::errors::NativeError;
    #[pymodule_export]
    use super::log::{PyBatch, PyJournal, PyLogReader, PySyncHandle};
    #[pymodule_export]
    use super::position::PyLogEnd;
}
