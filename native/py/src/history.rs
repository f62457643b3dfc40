//! History, views of it in this process, and restore.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ebbtide_core::constants::BLOCK_SIZE;
use ebbtide_core::crypto::GroupKey;
use ebbtide_core::device::BlockDevice;
use ebbtide_core::format::record::{Record, RecordBody};
use ebbtide_core::index::{History, HistoryError, Point, PointSpec, Timeline};
use ebbtide_core::storage::Directory;
use ebbtide_core::types::{Extent, Seq, TimeUs, VolumeIndex};
use ebbtide_core::view::View;
use ebbtide_core::view::restore::{Progress, restore};
use pyo3::prelude::*;

use crate::directory::open_directory;
use crate::errors::{bad_request, raise};
use crate::position::{PyLogEnd, group_id};

/// A recovery point as (seq, microseconds).
type Pair = (u64, u64);
/// seq, time, kind, volume, offset, length, label.
type RecordTuple = (u64, u64, &'static str, Option<u16>, u64, u64, String);

/// Words for `format::record::Cause`; numbers of later versions are "unknown".
const CAUSES: [&str; 10] = [
    "unknown",
    "first-copy",
    "unclean-stop",
    "spool-full",
    "spool-failed",
    "encoder-stuck",
    "backing-changed",
    "backing-error",
    "no-key",
    "requested",
];

fn cause_word(cause: u8) -> &'static str {
    CAUSES.get(usize::from(cause)).copied().unwrap_or(CAUSES[0])
}

fn pair(point: Point) -> Pair {
    (point.seq.0, point.time.0)
}

/// What a history has to offer, copied out.
#[pyclass(frozen, name = "Timeline", module = "ebbtide._native", get_all)]
#[derive(Debug)]
pub struct PyTimeline {
    oldest: Option<Pair>,
    newest: Option<Pair>,
    last_record: Option<Pair>,
    bookmarks: Vec<(u64, u64, String, bool)>,
    gaps: Vec<(u64, u64, u64, u64, &'static str)>,
    spans: Vec<(Pair, Option<Pair>, &'static str)>,
    volumes: Vec<(u16, String, u64)>,
    records: u64,
    log_bytes: u64,
}

impl From<Timeline> for PyTimeline {
    fn from(timeline: Timeline) -> Self {
        Self {
            oldest: timeline.oldest.map(pair),
            newest: timeline.newest.map(pair),
            last_record: timeline.last_record.map(pair),
            bookmarks: timeline
                .bookmarks
                .into_iter()
                .map(|b| (b.at.seq.0, b.at.time.0, b.label, b.exact))
                .collect(),
            gaps: timeline
                .gaps
                .iter()
                .map(|g| {
                    (
                        g.at.seq.0,
                        g.first_time.0,
                        g.at.time.0,
                        g.bytes,
                        cause_word(g.cause),
                    )
                })
                .collect(),
            spans: timeline
                .spans
                .iter()
                .map(|s| (pair(s.first), s.last.map(pair), cause_word(s.cause)))
                .collect(),
            volumes: timeline
                .volumes
                .into_iter()
                .map(|(i, name, size)| (i.0, name, size))
                .collect(),
            records: timeline.records,
            log_bytes: timeline.log_bytes,
        }
    }
}

/// The readable history of a group, up to a committed end.
#[pyclass(frozen, name = "History", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyHistory {
    history: Arc<History>,
    directory: Arc<dyn Directory>,
}

#[pymethods]
impl PyHistory {
    #[new]
    #[pyo3(signature = (directory, group, end=None))]
    fn new(
        py: Python<'_>,
        directory: &str,
        group: &[u8],
        end: Option<&PyLogEnd>,
    ) -> PyResult<Self> {
        let group = group_id(group)?;
        let directory = open_directory(Path::new(directory))?;
        let history = py
            .detach(|| History::open(Arc::clone(&directory), group, end.map(|end| &end.0)))
            .map_err(raise)?;
        Ok(Self {
            history: Arc::new(history),
            directory,
        })
    }

    fn timeline(&self, py: Python<'_>) -> PyResult<PyTimeline> {
        py.detach(|| self.history.timeline())
            .map(PyTimeline::from)
            .map_err(raise)
    }

    /// Records in a range of time, at most `limit`, oldest first; `volume` leaves out all others.
    fn records(
        &self,
        py: Python<'_>,
        from_us: u64,
        to_us: u64,
        volume: Option<u16>,
        limit: usize,
    ) -> PyResult<Vec<RecordTuple>> {
        py.detach(|| {
            let mut found = Vec::new();
            self.history
                .records(TimeUs(from_us), TimeUs(to_us), &mut |record| {
                    let tuple = describe(record);
                    if volume.is_none() || volume == tuple.3 {
                        found.push(tuple);
                    }
                    found.len() < limit
                })?;
            Ok(found)
        })
        .map_err(|error: HistoryError| raise(error))
    }
}

fn describe(record: &Record) -> RecordTuple {
    let extent_of = |extent: &Extent| {
        let block = BLOCK_SIZE as u64;
        (
            Some(extent.volume.0),
            extent.start.0 * block,
            extent.blocks * block,
        )
    };
    let (kind, (volume, offset, length), label) = match &record.body {
        RecordBody::Write { extent, .. } => ("write", extent_of(extent), ""),
        RecordBody::Resync { extent, .. } => ("resync", extent_of(extent), ""),
        RecordBody::Zero { extent } => ("zero", extent_of(extent), ""),
        RecordBody::Discard { extent } => ("discard", extent_of(extent), ""),
        RecordBody::Bookmark { label } => ("bookmark", (None, 0, 0), label.as_str()),
        RecordBody::Barrier => ("barrier", (None, 0, 0), ""),
        RecordBody::SpanBegin { cause } => ("span-begin", (None, 0, 0), cause_word(*cause as u8)),
        RecordBody::SpanEnd => ("span-end", (None, 0, 0), ""),
        RecordBody::Gap { cause, bytes, .. } => {
            ("gap", (None, 0, *bytes), cause_word(*cause as u8))
        }
        RecordBody::ClockStep { .. } => ("clock-step", (None, 0, 0), ""),
        RecordBody::Volume { volume, size, name } => {
            ("volume", (Some(volume.0), 0, *size), name.as_str())
        }
    };
    (
        record.seq.0,
        record.time.0,
        kind,
        volume,
        offset,
        length,
        label.to_owned(),
    )
}

/// A point as a control message names it.
fn point_spec(kind: &str, value: Option<PointValue>) -> PyResult<PointSpec> {
    match (kind, value) {
        ("newest", None) => Ok(PointSpec::Newest),
        ("at_time_us", Some(PointValue::Number(time))) => Ok(PointSpec::At(TimeUs(time))),
        ("at_seq", Some(PointValue::Number(seq))) => Ok(PointSpec::AtSeq(Seq(seq))),
        ("bookmark", Some(PointValue::Label(label))) => Ok(PointSpec::Bookmark(label)),
        _ => Err(bad_request(format!("no point is named by {kind:?}"))),
    }
}

#[derive(FromPyObject)]
enum PointValue {
    Number(u64),
    Label(String),
}

/// All volumes of a group at one point, read-only, in this process.
#[pyclass(frozen, name = "HistoryView", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyHistoryView {
    view: View,
    point: Point,
    #[pyo3(get)]
    volumes: Vec<(u16, String, u64)>,
}

#[pymethods]
impl PyHistoryView {
    #[new]
    fn new(
        py: Python<'_>,
        history: &PyHistory,
        key: &[u8],
        kind: &str,
        value: Option<PointValue>,
        exact: bool,
        cache_bytes: usize,
    ) -> PyResult<Self> {
        let key = key
            .try_into()
            .map_err(|_| bad_request("a group key has 32 bytes"))?;
        let spec = point_spec(kind, value)?;
        py.detach(|| {
            let point = history.history.resolve(&spec, exact)?;
            let volumes = history.history.volumes(point.seq);
            let view = View::open(
                Arc::clone(&history.history),
                Arc::clone(&history.directory),
                GroupKey(key),
                point,
                None,
                0,
                cache_bytes,
            )?;
            let volumes = volumes
                .into_iter()
                .map(|(i, name, size)| (i.0, name, size))
                .collect();
            Ok(Self {
                view,
                point,
                volumes,
            })
        })
        .map_err(|error: HistoryError| raise(error))
    }

    #[getter]
    fn seq(&self) -> u64 {
        self.point.seq.0
    }

    #[getter]
    fn time_us(&self) -> u64 {
        self.point.time.0
    }
}

/// Writes one volume of a view into a file or device.
#[pyclass(frozen, name = "Restore", module = "ebbtide._native")]
#[derive(Debug)]
pub struct PyRestore {
    device: Arc<dyn BlockDevice>,
    path: PathBuf,
    progress: Progress,
}

#[pymethods]
impl PyRestore {
    #[new]
    fn new(view: &PyHistoryView, volume: u16, path: PathBuf) -> PyResult<Self> {
        let device = view.view.device(VolumeIndex(volume)).map_err(raise)?;
        Ok(Self {
            device,
            path,
            progress: Progress::default(),
        })
    }

    /// Copies to the end; blocks.
    fn run(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| restore(&*self.device, &self.path, &self.progress))
            .map_err(raise)
    }

    /// Makes `run` end soon.
    fn cancel(&self) {
        self.progress.cancelled.store(true, Ordering::Relaxed);
    }

    #[getter]
    fn bytes_done(&self) -> u64 {
        self.progress.bytes_done.load(Ordering::Relaxed)
    }

    #[getter]
    fn bytes_written(&self) -> u64 {
        self.progress.bytes_written.load(Ordering::Relaxed)
    }
}
