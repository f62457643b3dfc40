//! Positions and ends of logs, as Python sees them.

use ebbtide_core::log::{LogEnd, LogPosition};
use ebbtide_core::server::proto;
use ebbtide_core::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};
use prost::Message as _;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::bad_request;

/// A 16-byte identity from Python.
pub fn identity(bytes: &[u8], what: &str) -> PyResult<[u8; 16]> {
    bytes
        .try_into()
        .map_err(|_| bad_request(format!("{what} has 16 bytes, not {}", bytes.len())))
}

pub fn group_id(bytes: &[u8]) -> PyResult<GroupId> {
    Ok(GroupId(identity(bytes, "a group")?))
}

pub fn generation(counter: u64, site: u64) -> Generation {
    Generation { counter, site }
}

/// A position as (incarnation, next frame).
pub fn position(pair: (Vec<u8>, u32)) -> PyResult<LogPosition> {
    let (incarnation, next_frame) = pair;
    Ok(LogPosition {
        incarnation: IncarnationId(identity(&incarnation, "an incarnation")?),
        next_frame: FrameNo(next_frame),
    })
}

/// State of the newest end of a log; immutable.
#[pyclass(frozen, name = "LogEnd", module = "ebbtide._native")]
#[derive(Debug, Clone)]
pub struct PyLogEnd(pub LogEnd);

#[pymethods]
impl PyLogEnd {
    /// Reads the `ebbtide.v1.LogEnd` message that a tap publishes.
    #[staticmethod]
    fn from_proto(message: &[u8]) -> PyResult<Self> {
        let message = proto::LogEnd::decode(message)
            .map_err(|error| bad_request(format!("not a LogEnd message: {error}")))?;
        Ok(Self(end_from_message(&message)?))
    }

    /// The same as an `ebbtide.v1.LogEnd` message.
    fn to_proto<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &proto::LogEnd::from(&self.0).encode_to_vec())
    }

    /// Incarnation, 16 bytes, or None if the log is empty.
    #[getter]
    fn incarnation<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.incarnation.map(|id| PyBytes::new(py, &id.0))
    }

    #[getter]
    fn ordinal(&self) -> u32 {
        self.0.ordinal
    }

    /// Frame that comes next in the incarnation.
    #[getter]
    fn next_frame(&self) -> u32 {
        self.0.last_frame.map_or(0, |frame| frame.0 + 1)
    }

    #[getter]
    fn last_digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.last_digest)
    }

    #[getter]
    fn last_seq(&self) -> u64 {
        self.0.last_seq.0
    }

    #[getter]
    fn last_time_us(&self) -> u64 {
        self.0.last_time.0
    }

    /// Ordinal and first frame of the segment that grows.
    #[getter]
    fn open_segment(&self) -> Option<(u32, u32)> {
        Some((self.0.ordinal, self.0.open_first_frame?.0))
    }

    #[getter]
    fn committed_len(&self) -> u64 {
        self.0.committed_len
    }

    #[getter]
    fn total_bytes(&self) -> u64 {
        self.0.total_bytes
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    fn __repr__(&self) -> String {
        format!(
            "LogEnd(seq={}, frame={:?}, bytes={})",
            self.0.last_seq.0,
            self.0.last_frame.map(|frame| frame.0),
            self.0.total_bytes
        )
    }
}

fn end_from_message(message: &proto::LogEnd) -> PyResult<LogEnd> {
    Ok(LogEnd {
        incarnation: if message.incarnation.is_empty() {
            None
        } else {
            Some(IncarnationId(identity(
                &message.incarnation,
                "an incarnation",
            )?))
        },
        ordinal: message.ordinal,
        last_frame: message.has_frame.then_some(FrameNo(message.last_frame)),
        last_digest: if message.last_digest.is_empty() {
            [0; 32]
        } else {
            message
                .last_digest
                .as_slice()
                .try_into()
                .map_err(|_| bad_request("a frame digest has 32 bytes"))?
        },
        last_seq: Seq(message.last_seq),
        last_time: TimeUs(message.last_time_us),
        open_first_frame: message
            .has_open
            .then_some(FrameNo(message.open_first_frame)),
        committed_len: message.committed_len,
        total_bytes: message.total_bytes,
    })
}
