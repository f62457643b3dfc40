//! Journal and log reader. Everything that touches a disk runs without the GIL.

use std::path::Path;
use std::sync::Arc;

use ebbtide_core::constants::FRAME_BYTES_MAX;
use ebbtide_core::format::frame::{FRAME_HEADER_LEN, FrameHeader};
use ebbtide_core::format::segment::SegmentHeader;
use ebbtide_core::index::{Indexer, Journal};
use ebbtide_core::log::{Batch, LogError, LogReader, RecoveryReport, SyncHandle};
use ebbtide_core::storage::Directory;
use parking_lot::{Mutex, RwLock};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::directory::open_directory;
use crate::errors::{bad_request, raise};
use crate::position::{PyLogEnd, generation, group_id, position};

/// What recovery found, in words for people.
fn notices(report: &RecoveryReport) -> Vec<String> {
    let mut found = Vec::new();
    if report.torn_bytes > 0 {
        found.push(format!(
            "a torn tail of {} bytes was cut",
            report.torn_bytes
        ));
    }
    if report.adopted_segments > 0 {
        found.push(format!(
            "{} sealed segments were adopted",
            report.adopted_segments
        ));
    }
    found.extend(
        report
            .damage
            .iter()
            .map(|damage| format!("damage: {damage}")),
    );
    found
}

/// The history that a target keeps of a group. One writer; safe to use from several threads.
#[pyclass(frozen, name = "Journal", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyJournal {
    /// None once closed. Held shared by every call, exclusively by `close`.
    journal: RwLock<Option<Journal>>,
    #[pyo3(get)]
    notices: Vec<String>,
}

impl PyJournal {
    /// Runs `work` on the open journal, without the GIL: a call may wait for another one's disk.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Journal) -> Result<T, LogError> + Send,
    ) -> PyResult<T> {
        py.detach(|| match &*self.journal.read() {
            Some(journal) => work(journal),
            None => Err(LogError::Poisoned),
        })
        .map_err(raise)
    }
}

#[pymethods]
impl PyJournal {
    #[new]
    fn new(py: Python<'_>, directory: &str, group: &[u8]) -> PyResult<Self> {
        let group = group_id(group)?;
        let directory = open_directory(Path::new(directory))?;
        let (journal, report) = py
            .detach(|| Journal::open(directory, group))
            .map_err(raise)?;
        Ok(Self {
            journal: RwLock::new(Some(journal)),
            notices: notices(&report),
        })
    }

    /// Refuses frames of older generations from now on; the caller has stored the promise.
    fn promise(&self, py: Python<'_>, counter: u64, site: u64) -> PyResult<()> {
        self.with(py, |journal| {
            journal.promise(generation(counter, site));
            Ok(())
        })
    }

    /// Announces an incarnation by its 256-byte segment header.
    fn begin(&self, py: Python<'_>, header: &[u8]) -> PyResult<()> {
        self.with(py, |journal| journal.begin(&SegmentHeader::parse(header)?))
    }

    /// Appends whole frames that follow `skip` other bytes of the message. Written, not durable.
    #[pyo3(signature = (message, skip=0))]
    fn append(&self, py: Python<'_>, message: &[u8], skip: usize) -> PyResult<PyLogEnd> {
        let frames = message
            .get(skip..)
            .ok_or_else(|| bad_request("skip is beyond the message"))?;
        self.with(py, |journal| journal.append(frames))
            .map(PyLogEnd)
    }

    fn sync_handle(&self, py: Python<'_>) -> PyResult<PySyncHandle> {
        self.with(py, Journal::sync_handle)
            .map(|handle| PySyncHandle { handle })
    }

    fn end(&self, py: Python<'_>) -> PyResult<PyLogEnd> {
        self.with(py, |journal| Ok(PyLogEnd(journal.end())))
    }

    /// The manifest as JSON, events of the open segment included.
    fn manifest_json(&self, py: Python<'_>) -> PyResult<String> {
        let manifest = self.with(py, |journal| Ok(journal.manifest()))?;
        serde_json::to_string(&manifest).map_err(|error| bad_request(error.to_string()))
    }

    /// Lets go of the directory, after the calls that are running.
    fn close(&self, py: Python<'_>) {
        py.detach(|| *self.journal.write() = None);
    }
}

/// Makes durable what was appended before it was made; used while appends go on.
#[pyclass(frozen, name = "SyncHandle", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PySyncHandle {
    handle: SyncHandle,
}

#[pymethods]
impl PySyncHandle {
    /// What is durable once `sync` has returned.
    #[getter]
    fn end(&self) -> PyLogEnd {
        PyLogEnd(self.handle.end().clone())
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.handle.sync()).map_err(raise)
    }
}

/// Keeps the index runs of a log that another process writes.
#[pyclass(frozen, name = "Indexer", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyIndexer {
    indexer: Indexer,
}

#[pymethods]
impl PyIndexer {
    #[new]
    fn new(directory: &str, group: &[u8]) -> PyResult<Self> {
        let group = group_id(group)?;
        let directory = open_directory(Path::new(directory))?;
        Ok(Self {
            indexer: Indexer::new(directory, group),
        })
    }

    /// Builds and merges what is due; returns how many sealed segments have runs.
    fn index_sealed(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.indexer.index_sealed()).map_err(raise)
    }

    /// Makes `index_sealed` end soon, with an error.
    fn stop(&self) {
        self.indexer.stop();
    }
}

/// Frames read in one go, ready for the wire.
#[pyclass(frozen, name = "Batch", module = "ebbtide._native", get_all)]
#[derive(Debug)]
pub struct PyBatch {
    /// Message `INCA` with its segment header; to be sent first if not None.
    announcement: Option<Py<PyBytes>>,
    /// Message `FRAM` with the frames.
    message: Py<PyBytes>,
    incarnation: Py<PyBytes>,
    first_frame: u32,
    last_frame: u32,
    first_time_us: u64,
    last_time_us: u64,
    last_seq: u64,
    frame_count: u32,
}

fn tagged(py: Python<'_>, tag: [u8; 4], body: &[u8]) -> PyResult<Py<PyBytes>> {
    PyBytes::new_with(py, tag.len() + body.len(), |bytes| {
        bytes[..tag.len()].copy_from_slice(&tag);
        bytes[tag.len()..].copy_from_slice(body);
        Ok(())
    })
    .map(Bound::unbind)
}

fn to_python(py: Python<'_>, batch: &Batch) -> PyResult<PyBatch> {
    let first = batch
        .frames
        .get(..FRAME_HEADER_LEN)
        .ok_or_else(|| bad_request("invariant: a batch holds at least one frame"))?;
    let first = FrameHeader::parse(first).map_err(|error| raise(LogError::from(error)))?;
    Ok(PyBatch {
        announcement: match &batch.header {
            Some(header) => Some(tagged(py, *b"INCA", &header.encode())?),
            None => None,
        },
        message: tagged(py, *b"FRAM", &batch.frames)?,
        incarnation: PyBytes::new(py, &first.incarnation.0).unbind(),
        first_frame: batch.first_frame.0,
        last_frame: batch.last_frame.0,
        first_time_us: first.first_time.0,
        last_time_us: batch.last_time.0,
        last_seq: batch.last_seq.0,
        frame_count: batch.frame_count,
    })
}

/// Reads a log that another process may be writing.
#[pyclass(frozen, name = "LogReader", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyLogReader {
    reader: Mutex<LogReader>,
}

#[pymethods]
impl PyLogReader {
    /// `verify`: frames are checked against their body digests. Whoever hands them on to a journal,
    /// which checks them anyway, saves this side the time.
    #[new]
    #[pyo3(signature = (directory, group, *, verify=true))]
    fn new(py: Python<'_>, directory: &str, group: &[u8], verify: bool) -> PyResult<Self> {
        let group = group_id(group)?;
        let directory: Arc<dyn Directory> = open_directory(Path::new(directory))?;
        let mut reader = py
            .detach(|| LogReader::open(directory, group))
            .map_err(raise)?;
        reader.verify_bodies(verify);
        Ok(Self {
            reader: Mutex::new(reader),
        })
    }

    /// Goes to (incarnation, next frame); None is the oldest frame held.
    #[pyo3(signature = (to=None))]
    fn seek(&self, py: Python<'_>, to: Option<(Vec<u8>, u32)>) -> PyResult<()> {
        let to = to.map(position).transpose()?;
        py.detach(|| self.reader.lock().seek(to.as_ref()))
            .map_err(raise)
    }

    /// Whether a log that ends at (incarnation, next frame), its last frame having `digest`, holds
    /// nothing but what this one holds or held.
    fn agrees(
        &self,
        py: Python<'_>,
        at: (Vec<u8>, u32),
        digest: &[u8],
        end: &PyLogEnd,
    ) -> PyResult<bool> {
        let at = position(at)?;
        let digest = digest
            .try_into()
            .map_err(|_| bad_request("a frame digest has 32 bytes"))?;
        py.detach(|| self.reader.lock().agrees(&at, &digest, &end.0))
            .map_err(raise)
    }

    /// Next frames up to `end`, or None if there are none yet.
    fn next_batch(
        &self,
        py: Python<'_>,
        end: &PyLogEnd,
        max_bytes: usize,
    ) -> PyResult<Option<PyBatch>> {
        let max_bytes = max_bytes.min(FRAME_BYTES_MAX);
        let batch = py
            .detach(|| self.reader.lock().next_batch(&end.0, max_bytes))
            .map_err(raise)?;
        batch.map(|batch| to_python(py, &batch)).transpose()
    }
}
