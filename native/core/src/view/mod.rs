//! View: block devices that show a group as of a point. Reads go overlay -> index -> cells, with a
//! cache of decoded cells; writes go to the overlay (sparse file plus presence bitmap).

use std::sync::Arc;

use crate::crypto::GroupKey;
use crate::device::BlockDevice;
use crate::index::{History, HistoryError, Point};
use crate::storage::Directory;
use crate::types::VolumeIndex;

/// All volumes of a group at one point.
#[derive(Debug)]
pub struct View {
    _private: (),
}

impl View {
    /// `overlay` is the directory of the writable layer; without it the view is read-only.
    /// `overlay_bytes_max` limits it; `cache_bytes` limits decoded cells.
    pub fn open(
        history: Arc<History>,
        directory: Arc<dyn Directory>,
        key: GroupKey,
        point: Point,
        overlay: Option<Arc<dyn Directory>>,
        overlay_bytes_max: u64,
        cache_bytes: usize,
    ) -> Result<Self, HistoryError> {
        let _ = (history, directory, key, point, overlay, overlay_bytes_max, cache_bytes);
        todo!()
    }

    /// The device of one volume.
    pub fn device(&self, volume: VolumeIndex) -> Result<Arc<dyn BlockDevice>, HistoryError> {
        let _ = volume;
        todo!()
    }
}
