//! From the errors of the data path to what people see.

use super::failure::{ExitCode, Failure};
use super::loop_device::LoopError;
use crate::crypto::sm4::{KERNEL_VARIABLE, KernelError};
use crate::index::HistoryError;
use crate::log::LogError;
use crate::storage::is_full;
use crate::tap::TapError;
use crate::view::restore::RestoreError;

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        let message = error.to_string();
        match error {
            LogError::Io { action, source } => Self::io(action, &source),
            LogError::NoSpace => Self::new(
                "no-space",
                ExitCode::NoSpace,
                message,
                "make room on the file system of the spool or journal",
            ),
            LogError::Locked => Self::state(
                "in-use",
                message,
                "another tap server or agent has this log open; see ebb status",
            ),
            LogError::Poisoned => Self::state(
                "poisoned",
                message,
                "restart the process: it recovers the log",
            ),
            LogError::ForeignGroup { .. } => Self::config(message),
            LogError::Fenced { .. } => Self::state(
                "fenced",
                message,
                "another site has a newer generation of this group",
            ),
            // Words of their own for what parts the line of a source from that of its target.
            LogError::UnknownIncarnation(_) => parted("unknown-incarnation", message),
            LogError::OutOfOrder { .. } => parted("out-of-order", message),
            LogError::BrokenChain { .. } => parted("broken-chain", message),
            LogError::BelowFloor { .. } => parted("below-floor", message),
            LogError::SeqReused { .. } | LogError::TimeReused { .. } => {
                parted("seq-reused", message)
            }
            LogError::Conflict { .. }
            | LogError::IncarnationConflict(_)
            | LogError::IncarnationClosed(_) => parted("conflict", message),
            LogError::Damaged { .. } | LogError::Format(_) => Self::new(
                "damaged",
                ExitCode::Damaged,
                message,
                "restore these files from the other site, or begin a new log",
            ),
        }
    }
}

fn parted(code: &'static str, message: String) -> Failure {
    let hint = "the source begins a new incarnation and copies its volumes";
    Failure::new(code, ExitCode::Damaged, message, hint)
}

impl From<KernelError> for Failure {
    fn from(error: KernelError) -> Self {
        Self {
            hint: "unset it, and the best one is used",
            ..Self::config(format!("{KERNEL_VARIABLE}: {error}"))
        }
    }
}

impl From<LoopError> for Failure {
    fn from(error: LoopError) -> Self {
        let message = error.to_string();
        match error {
            LoopError::Io { source, .. } => {
                let failure = Self::io("use the loop device", &source);
                Self { message, ..failure }
            }
            LoopError::Attached { .. } | LoopError::InUse { .. } => Self::state(
                "in-use",
                message,
                "unmount it or end who uses it, then repeat",
            ),
            LoopError::NotAttached { .. } => Self::new(
                "not-found",
                ExitCode::NotFound,
                message,
                "'losetup -a' lists what is attached",
            ),
            LoopError::NoneFree => Self::new(
                "limit",
                ExitCode::NoSpace,
                message,
                "detach one: 'losetup -a' lists them",
            ),
            LoopError::Program { .. } => Self::new(
                "unsupported",
                ExitCode::Privilege,
                message,
                "install util-linux",
            ),
        }
    }
}

impl From<TapError> for Failure {
    fn from(error: TapError) -> Self {
        let message = error.to_string();
        match error {
            TapError::Io { source, .. } if is_full(&source) => Self::new(
                "no-space",
                ExitCode::NoSpace,
                message,
                "make room on this file system",
            ),
            TapError::Io {
                path,
                action,
                source,
            } => {
                let mut failure = Self::io(action, &source);
                failure.message = format!("{}: {}", path.display(), failure.message);
                failure
            }
            TapError::InUse { .. } => Self::state(
                "in-use",
                message,
                "stop what uses the volume, or the other tap",
            ),
            TapError::Shrunk { .. } => Self::state(
                "volume-shrank",
                message,
                "give the volume its size back, or unprotect and protect it anew",
            ),
            TapError::SpoolOnVolume { .. } => Self::state(
                "on-protected-volume",
                message,
                "keep spool and state on a disk that is not protected by this group",
            ),
            TapError::Log(error) => error.into(),
            _ => Self::state(
                "state",
                message,
                "see ebb status and the log of the tap server",
            ),
        }
    }
}

impl From<HistoryError> for Failure {
    fn from(error: HistoryError) -> Self {
        const SPAN: &str = "ebb points shows the span that can be opened";
        let message = error.to_string();
        let (code, hint) = match error {
            HistoryError::Log(error) => return error.into(),
            HistoryError::InFuture { .. } => ("in-future", SPAN),
            HistoryError::SeqOutside { asked, newest, .. } if asked > newest => ("in-future", SPAN),
            HistoryError::BeforeHorizon { .. } | HistoryError::SeqOutside { .. } => {
                ("before-horizon", SPAN)
            }
            HistoryError::Overlay { source, .. } => {
                let failure = Self::from(source);
                return Self { message, ..failure };
            }
            HistoryError::InsideSpan { .. } => (
                "inside-span",
                "without --exact the last consistent point before it is opened",
            ),
            HistoryError::NoBookmark(_) => ("no-bookmark", "ebb points lists the bookmarks"),
            HistoryError::Empty => (
                "no-point",
                "wait until the first copy is complete; see ebb status",
            ),
            HistoryError::NoVolume(_) => {
                let hint = "ebb status lists the volumes";
                return Self::new("not-found", ExitCode::NotFound, message, hint);
            }
        };
        Self::new(code, ExitCode::NoPoint, message, hint)
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        let message = error.to_string();
        match error {
            RestoreError::Io { action, source } => Self {
                message,
                ..Self::io(action, &source)
            },
            RestoreError::History { .. } => Self::new(
                "damaged",
                ExitCode::Damaged,
                message,
                "history or its key is damaged there; the log of the agent has the place",
            ),
            RestoreError::TooSmall { .. } => Self::new(
                "too-small",
                ExitCode::Usage,
                message,
                "name a device that is at least as large",
            ),
            RestoreError::Cancelled => Self::state("cancelled", message, "repeat it to go on"),
        }
    }
}
