//! Errors as people and programs see them: a stable word, a sentence, a hint and an exit code.

use std::io;

use super::proto;

/// Exit codes, as the command line documents them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    Ok = 0,
    Internal = 1,
    Usage = 2,
    Config = 3,
    NotFound = 4,
    State = 5,
    Unreachable = 6,
    Damaged = 7,
    NoSpace = 8,
    Privilege = 9,
    NoPoint = 10,
}

/// Why a server did not start or a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Stable word, such as "in-use".
    pub code: &'static str,
    pub message: String,
    pub hint: &'static str,
    pub exit: ExitCode,
}

impl Failure {
    pub fn new(
        code: &'static str,
        exit: ExitCode,
        message: impl Into<String>,
        hint: &'static str,
    ) -> Self {
        Self {
            code,
            message: message.into(),
            hint,
            exit,
        }
    }

    /// An error of the operating system while doing `action`, such as "open the spool".
    pub fn io(action: &str, error: &io::Error) -> Self {
        let message = format!("cannot {action}: {error}");
        let (code, exit, hint) = match error.kind() {
            io::ErrorKind::NotFound => ("not-found", ExitCode::NotFound, "check the path"),
            io::ErrorKind::PermissionDenied => {
                ("privilege", ExitCode::Privilege, "run the agent as root")
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => (
                "no-space",
                ExitCode::NoSpace,
                "make room on this file system",
            ),
            io::ErrorKind::AddrInUse | io::ErrorKind::ResourceBusy => (
                "in-use",
                ExitCode::State,
                "another process uses it; see ebb status",
            ),
            io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => (
                "unreachable",
                ExitCode::Unreachable,
                "is the process at the other end alive?",
            ),
            _ => (
                "io",
                ExitCode::Internal,
                "see the message of the operating system",
            ),
        };
        Self {
            code,
            message,
            hint,
            exit,
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(
            "internal",
            ExitCode::Internal,
            message,
            "this is a defect: please report it",
        )
    }

    /// A request that cannot be understood.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(
            "usage",
            ExitCode::Usage,
            message,
            "client and server differ in version?",
        )
    }

    /// A launch message with a value that cannot be.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(
            "config",
            ExitCode::Config,
            message,
            "check the agent's configuration",
        )
    }

    pub fn state(code: &'static str, message: impl Into<String>, hint: &'static str) -> Self {
        Self::new(code, ExitCode::State, message, hint)
    }
}

impl From<Failure> for proto::Failure {
    fn from(failure: Failure) -> Self {
        Self {
            code: failure.code.into(),
            message: failure.message,
            hint: failure.hint.into(),
            exit_code: u32::from(failure.exit as u8),
        }
    }
}
