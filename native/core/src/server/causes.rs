//! From the errors of the data path to what people see.

use super::failure::{ExitCode, Failure};
use crate::index::HistoryError;
use crate::log::LogError;
use crate::storage::is_full;
use crate::tap::TapError;

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
            _ => Self::new(
                "damaged",
                ExitCode::Damaged,
                message,
                "restore these files from the other site, or begin a new log",
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
                "shrunk",
                message,
                "give the volume its size back, or unprotect and protect it anew",
            ),
            TapError::SpoolOnVolume { .. } => Self::new(
                "spool-on-volume",
                ExitCode::Config,
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
        let message = error.to_string();
        let hint = match error {
            HistoryError::Log(error) => return error.into(),
            HistoryError::BeforeHorizon { .. } | HistoryError::InFuture { .. } => {
                "ebb points shows the span that can be opened"
            }
            HistoryError::InsideSpan { .. } => {
                "without --exact the last consistent point before it is opened"
            }
            HistoryError::NoBookmark(_) => "ebb points lists the bookmarks",
            HistoryError::Empty => "wait until the first copy is complete; see ebb status",
            HistoryError::NoVolume(_) => {
                let hint = "ebb status lists the volumes";
                return Self::new("not-found", ExitCode::NotFound, message, hint);
            }
        };
        Self::new("no-point", ExitCode::NoPoint, message, hint)
    }
}
