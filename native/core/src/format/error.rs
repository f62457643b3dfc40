//! Why bytes are not what they should be.

/// A finding about foreign bytes. `what` names the structure ("frame header", "record table").
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    #[error("{what}: {have} bytes where {need} are needed")]
    Truncated {
        what: &'static str,
        need: usize,
        have: usize,
    },
    #[error("{what}: magic {found:02x?} is not {expected:02x?}")]
    Magic {
        what: &'static str,
        expected: [u8; 8],
        found: [u8; 8],
    },
    #[error("{what}: version {found} is not among the supported {min}..={max}")]
    Version {
        what: &'static str,
        found: u16,
        min: u16,
        max: u16,
    },
    #[error("{what}: checksum {found:016x} is not the computed {computed:016x}")]
    Checksum {
        what: &'static str,
        computed: u64,
        found: u64,
    },
    #[error("{what}: digest does not match its bytes")]
    Digest { what: &'static str },
    #[error("{what}: field {field} holds {value}, the limit is {limit}")]
    Limit {
        what: &'static str,
        field: &'static str,
        value: u64,
        limit: u64,
    },
    #[error("{what}: field {field} is malformed: {reason}")]
    Field {
        what: &'static str,
        field: &'static str,
        reason: &'static str,
    },
}
