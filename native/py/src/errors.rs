//! The one mapping of errors: every native failure is a `NativeError(code, message, hint)`.
//!
//! `code` is a stable word that `ebbtide.errors` turns into a class and an exit code; the message
//! and the hint are for people.

use std::fmt::Display;
use std::io;

use ebbtide_core::crypto::CryptoError;
use ebbtide_core::format::FormatError;
use ebbtide_core::index::HistoryError;
use ebbtide_core::log::LogError;
use ebbtide_core::server::LoopError;
use pyo3::PyErr;
use pyo3::exceptions::PyException;

pyo3::create_exception!(
    _native,
    NativeError,
    PyException,
    "A failure of the native part: args are (code, message, hint)."
);

/// What a failure is called, and what to do about it.
pub trait Failure: Display {
    fn code(&self) -> &'static str;

    fn hint(&self) -> &'static str {
        ""
    }
}

/// Turns a native failure into the exception.
pub fn raise(failure: &dyn Failure) -> PyErr {
    NativeError::new_err((failure.code(), failure.to_string(), failure.hint()))
}

/// An argument that Python code should not have passed.
pub fn bad_request(message: impl Into<String>) -> PyErr {
    NativeError::new_err(("bad-request", message.into(), ""))
}

/// The word for an operating system error.
fn io_code(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "no-space",
        io::ErrorKind::NotFound => "not-found",
        io::ErrorKind::PermissionDenied => "privilege",
        io::ErrorKind::ResourceBusy => "in-use",
        io::ErrorKind::Unsupported => "unsupported",
        io::ErrorKind::Interrupted => "stopping",
        _ => "io",
    }
}

impl Failure for io::Error {
    fn code(&self) -> &'static str {
        io_code(self)
    }
}

impl Failure for FormatError {
    fn code(&self) -> &'static str {
        match self {
            Self::Version { .. } => "version",
            _ => "damaged",
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::Version { .. } => "both agents and all logs must be of compatible versions",
            _ => "the bytes were damaged or are not Ebbtide's; restore them from a copy",
        }
    }
}

impl Failure for CryptoError {
    fn code(&self) -> &'static str {
        "damaged"
    }
}

impl Failure for LogError {
    fn code(&self) -> &'static str {
        match self {
            Self::Io { source, .. } => io_code(source),
            Self::Poisoned => "poisoned",
            Self::Locked => "locked",
            Self::NoSpace => "no-space",
            Self::Damaged { source, .. } | Self::Format(source) => source.code(),
            Self::ForeignGroup { .. } => "unknown-group",
            Self::Fenced { .. } => "fenced",
            Self::UnknownIncarnation(_) => "unknown-incarnation",
            Self::OutOfOrder { .. } => "out-of-order",
            Self::BrokenChain { .. } => "broken-chain",
            Self::BelowFloor { .. } => "below-floor",
            Self::Conflict { .. } => "conflict",
            Self::SeqReused { .. } | Self::TimeReused { .. } => "seq-reused",
            Self::IncarnationConflict(_) | Self::IncarnationClosed(_) => "conflict",
            _ => "internal",
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::NoSpace => "free space on the disk; work goes on by itself",
            Self::Locked => "another process writes this directory; end it first",
            Self::Poisoned => "the log is recovered by the next start",
            Self::Fenced { .. } => "a newer generation was promised; this source is out of date",
            Self::Conflict { .. } => {
                "the source was rolled back or cloned; it must start a new incarnation"
            }
            Self::Damaged { source, .. } | Self::Format(source) => source.hint(),
            _ => "",
        }
    }
}

impl Failure for HistoryError {
    fn code(&self) -> &'static str {
        match self {
            Self::Log(source) => source.code(),
            Self::BeforeHorizon { .. } => "before-horizon",
            Self::InFuture { .. } => "in-future",
            Self::InsideSpan { .. } => "inside-span",
            Self::NoBookmark(_) => "no-bookmark",
            Self::Empty => "no-point",
            Self::NoVolume(_) => "unknown-volume",
            _ => "internal",
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::Log(source) => source.hint(),
            Self::BeforeHorizon { .. } | Self::InFuture { .. } | Self::NoBookmark(_) => {
                "'ebb points GROUP' shows what history holds"
            }
            Self::InsideSpan { .. } => "leave out --exact to get the last consistent point before",
            Self::Empty => "wait until the first copy has reached the target: 'ebb status'",
            _ => "",
        }
    }
}

impl Failure for LoopError {
    fn code(&self) -> &'static str {
        match self {
            Self::Io { source, .. } => io_code(source),
            Self::Attached { .. } | Self::InUse { .. } => "in-use",
            Self::NotAttached { .. } => "not-found",
            Self::NoneFree => "limit",
            Self::Program { .. } => "unsupported",
            _ => "internal",
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "unmount it or end who uses it, then repeat",
            Self::NoneFree => "detach one: 'losetup -a' lists them",
            Self::Program { .. } => "install util-linux",
            _ => "",
        }
    }
}
