//! The one mapping of errors: every native failure is a `NativeError(code, message, hint, kind)`.
//!
//! `code` is a stable word, `kind` the exit code, as in `ebbtide.errors`; message and hint are for
//! people. Which failure is which, `ebbtide_core::server` knows.

use ebbtide_core::server::Failure;
use pyo3::PyErr;
use pyo3::exceptions::PyException;

pyo3::create_exception!(
    _native,
    NativeError,
    PyException,
    "A failure of the native part: args are (code, message, hint, kind)."
);

/// Turns a native failure into the exception.
pub fn raise(failure: impl Into<Failure>) -> PyErr {
    let failure = failure.into();
    let kind = failure.exit as u8;
    NativeError::new_err((failure.code, failure.message, failure.hint, kind))
}

/// An argument that Python code should not have passed.
pub fn bad_request(message: impl Into<String>) -> PyErr {
    raise(Failure::usage(message))
}
