//! View: block devices that show a group as of a point. Reads go overlay -> index -> cells, with a
//! cache of decoded cells; writes go to the overlay (sparse file plus presence map).
//!
//! A view never changes history: several views of the same or of different points, and the writer,
//! go on side by side.

mod cells;
mod device;
mod overlay;
pub mod presence;
pub mod restore;

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // sizes of tests are small
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use cells::CellReader;
pub use cells::Finding;
use device::ViewDevice;
use overlay::{Overlay, Space};

use crate::constants::{BLOCK_SIZE, VOLUME_BYTES_MAX};
use crate::crypto::GroupKey;
use crate::device::BlockDevice;
use crate::format::FormatError;
use crate::index::{History, HistoryError, Point};
use crate::log::LogError;
use crate::storage::Directory;
use crate::types::VolumeIndex;

/// All volumes of a group at one point.
#[derive(Debug)]
pub struct View {
    point: Point,
    names: Vec<(VolumeIndex, String, u64)>,
    devices: BTreeMap<VolumeIndex, Arc<ViewDevice>>,
    cells: Arc<CellReader>,
    space: Arc<Space>,
}

impl View {
    /// `overlay` is the directory of the writable layer; without it the view is read-only.
    /// `overlay_bytes_max` limits it; `cache_bytes` limits decoded cells.
    ///
    /// An overlay that exists is continued: what was flushed into it is there. It must have been
    /// made for the same group and point.
    #[allow(clippy::needless_pass_by_value)] // the caller's parts become the view's
    pub fn open(
        history: Arc<History>,
        directory: Arc<dyn Directory>,
        key: GroupKey,
        point: Point,
        overlay: Option<Arc<dyn Directory>>,
        overlay_bytes_max: u64,
        cache_bytes: usize,
    ) -> Result<Self, HistoryError> {
        // History holds the shared lock that keeps retention from the files of this directory.
        drop(directory);
        let names = history.volumes(point.seq);
        let cells = Arc::new(CellReader::new(Arc::clone(&history), key, cache_bytes));
        let space = Arc::new(Space::new(overlay_bytes_max));
        let mut devices = BTreeMap::new();
        for (volume, _, size) in &names {
            if *size > VOLUME_BYTES_MAX {
                let source = FormatError::Limit {
                    what: "volume record",
                    field: "size",
                    value: *size,
                    limit: VOLUME_BYTES_MAX,
                };
                return Err(LogError::Format(source).into());
            }
            let layer = match &overlay {
                None => None,
                Some(directory) => {
                    let binding = presence::Binding {
                        group: history.group(),
                        volume: *volume,
                        seq: point.seq,
                        blocks: size.div_ceil(BLOCK_SIZE as u64),
                    };
                    Some(Overlay::open(
                        directory.as_ref(),
                        binding,
                        Arc::clone(&space),
                    )?)
                }
            };
            let device = ViewDevice::new(Arc::clone(&cells), *volume, *size, point.seq, layer);
            devices.insert(*volume, Arc::new(device));
        }
        Ok(Self {
            point,
            names,
            devices,
            cells,
            space,
        })
    }

    /// The device of one volume.
    pub fn device(&self, volume: VolumeIndex) -> Result<Arc<dyn BlockDevice>, HistoryError> {
        match self.devices.get(&volume) {
            Some(device) => Ok(Arc::clone(device) as Arc<dyn BlockDevice>),
            None => Err(HistoryError::NoVolume(volume.0.to_string())),
        }
    }

    pub fn point(&self) -> Point {
        self.point
    }

    /// Index, name and bytes of the volumes.
    pub fn volumes(&self) -> &[(VolumeIndex, String, u64)] {
        &self.names
    }

    /// Bytes that the overlays of all volumes hold.
    pub fn overlay_bytes(&self) -> u64 {
        self.space.used()
    }

    /// Cells that were read and opened, those needed by references included.
    pub fn cells_opened(&self) -> u64 {
        self.cells.opened()
    }

    /// Damage that reads have met, the newest last; a bounded number is kept.
    pub fn findings(&self) -> Vec<Finding> {
        self.cells.findings()
    }
}
