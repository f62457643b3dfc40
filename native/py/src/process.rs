//! Main functions of the server processes, the agent's share in keeping a mount, and loop devices.

use std::os::fd::OwnedFd;
use std::path::Path;

use ebbtide_core::server::{self, HolderLink};
use pyo3::prelude::*;

use crate::errors::raise;

/// Is a tap server until it ends; returns the exit code.
#[pyfunction]
pub fn tap_main(py: Python<'_>, launch: &[u8]) -> i32 {
    py.detach(|| server::tap_main(launch))
}

/// Is a view server until it ends; returns the exit code.
#[pyfunction]
pub fn view_main(py: Python<'_>, launch: &[u8]) -> i32 {
    py.detach(|| server::view_main(launch))
}

/// Is a holder until it ends; returns the exit code.
#[pyfunction]
pub fn holder_main(py: Python<'_>, launch: &[u8]) -> i32 {
    py.detach(|| server::holder_main(launch))
}

/// Keeps keys out of core files and away from debuggers of the same user, until the next exec.
#[pyfunction]
pub fn forbid_core_files() {
    server::memory::forbid_core_files();
}

/// A duplicate of a mount's /dev/fuse descriptor, closed when dropped. Kept, never read: so that
/// the mount outlives the death of its server and its holder at once.
#[pyclass(frozen, name = "FuseDescriptor", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyFuseDescriptor(OwnedFd);

#[pymethods]
impl PyFuseDescriptor {
    /// Asks a holder for a duplicate.
    #[staticmethod]
    fn copy_from(py: Python<'_>, holder_socket: &str) -> PyResult<Self> {
        py.detach(|| HolderLink::copy(Path::new(holder_socket)))
            .map(Self)
            .map_err(raise)
    }

    /// Offers it to a holder, which takes it if it has none.
    fn give_to(&self, py: Python<'_>, holder_socket: &str) -> PyResult<()> {
        py.detach(|| HolderLink::keep(Path::new(holder_socket), &self.0))
            .map_err(raise)?;
        Ok(())
    }
}

/// Path of a loop device over a file, direct I/O on both.
#[pyfunction]
pub fn loop_attach(py: Python<'_>, file: &str, read_only: bool) -> PyResult<String> {
    py.detach(|| server::loop_attach(Path::new(file), read_only))
        .map_err(raise)
}

/// Gives a loop device back.
#[pyfunction]
pub fn loop_detach(py: Python<'_>, device: &str) -> PyResult<()> {
    py.detach(|| server::loop_detach(device)).map_err(raise)
}
