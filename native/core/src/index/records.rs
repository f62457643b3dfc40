//! Single records of history in a range of time.

use super::HistoryError;
use super::history::History;
use crate::format::record::Record;
use crate::types::{FrameNo, TimeUs};

impl History {
    /// Calls `each` for every record with `from <= time <= to`, oldest first, until it returns
    /// false. Costs a search for the start and the tables of the frames in the range.
    pub fn records(
        &self,
        from: TimeUs,
        to: TimeUs,
        each: &mut dyn FnMut(&Record) -> bool,
    ) -> Result<(), HistoryError> {
        let first = self
            .segments
            .partition_point(|segment| segment.last_time < from);
        for number in first..self.segments.len() {
            let segment = &self.segments[number];
            if segment.first_time > to {
                break;
            }
            let file = self.file(number)?;
            let (mut frame, last) = (segment.key.first_frame.0, segment.key.last_frame.0);
            let mut high = last;
            // The first frame whose last record is not before the range.
            while frame < high {
                let middle = frame + (high - frame) / 2;
                let header = file.frame_header(self.frame_offset(segment, FrameNo(middle))?)?;
                if header.last_time < from {
                    frame = middle + 1;
                } else {
                    high = middle;
                }
            }
            while frame <= last {
                let offset = self.frame_offset(segment, FrameNo(frame))?;
                let header = file.frame_header(offset)?;
                if header.first_time > to {
                    return Ok(());
                }
                for placed in file.records(offset, &header)? {
                    let record = &placed.record;
                    if record.time > to {
                        return Ok(());
                    }
                    if record.time >= from && !each(record) {
                        return Ok(());
                    }
                }
                frame += 1;
            }
        }
        Ok(())
    }
}
