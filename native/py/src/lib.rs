//! `ebbtide._native`: registers what `native/core` offers to Python, converts errors, and lets go
//! of the GIL around everything that can take more than about 10 us. Nothing else.

mod crypto;
mod directory;
mod errors;
mod history;
mod log;
mod position;
mod process;

use pyo3::panic::PanicException;
use pyo3::prelude::*;

#[pymodule]
mod _native {
    use super::{Bound, PanicException, PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use super::crypto::{PyGcm, PyText, Sm4Cbc, Sm4Ctr, Sm4Xts, sm4_kernel, sm4_kernels};
    #[pymodule_export]
    use super::errors::NativeError;
    #[pymodule_export]
    use super::history::{PyHistory, PyHistoryView, PyRestore, PyTimeline};
    #[pymodule_export]
    use super::log::{PyBatch, PyIndexer, PyJournal, PyLogReader, PySyncHandle};
    #[pymodule_export]
    use super::position::PyLogEnd;
    #[pymodule_export]
    use super::process::{
        PyFuseDescriptor, forbid_core_files, holder_main, loop_attach, loop_detach, tap_main,
        view_main,
    };

    /// What a panic of native code becomes.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("PanicException", module.py().get_type::<PanicException>())
    }
}
