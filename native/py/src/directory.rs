//! Opens a directory on disk for the core.

use std::path::Path;
use std::sync::Arc;

use ebbtide_core::server::Failure;
use ebbtide_core::storage::{Directory, DiskDirectory};
use pyo3::PyResult;

use crate::errors::raise;

pub fn open_directory(path: &Path) -> PyResult<Arc<dyn Directory>> {
    match DiskDirectory::open(path) {
        Ok(directory) => Ok(Arc::new(directory)),
        Err(error) => Err(raise(Failure::io(
            &format!("open {}", path.display()),
            &error,
        ))),
    }
}
