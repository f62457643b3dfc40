//! `ebbtide._native`: registers what `native/core` offers to Python; nothing else.

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");
}
