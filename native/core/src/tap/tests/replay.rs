//! Reads a spool back in plain code: the oracle of these tests. Decodes every frame, applies every
//! record in order, keeps the state of the blocks, and checks what must hold between records.

use std::collections::HashMap;
use std::sync::Arc;

use crate::codec::{CodecError, FrameMap, FrameSource, open_cell};
use crate::constants::{BLOCK_SIZE, CELL_BLOCKS};
use crate::crypto::{GroupKey, IncarnationKey, Suite};
use crate::format::frame::{FrameFlags, FrameHeader, verify_body};
use crate::format::record::{BlockPayload, Payload, Record, RecordBody, read_table};
use crate::log::{LogEnd, LogReader};
use crate::storage::Directory;
use crate::types::{FrameNo, GroupId, IncarnationId, Seq};

type Key = (u16, u64);

/// Everything that a spool holds, in order.
#[derive(Debug, Default)]
pub struct Replay {
    /// Records with the contents of their blocks (writes and resync records).
    pub records: Vec<(Record, Vec<Vec<u8>>)>,
    pub incarnations: Vec<IncarnationId>,
    pub frames: usize,
    /// Blocks that were recorded as Same.
    pub same: usize,
}

struct OneFrame<'a> {
    map: Arc<FrameMap>,
    bytes: &'a [u8],
}

impl FrameSource for OneFrame<'_> {
    fn map(&self, _frame_no: FrameNo) -> Result<Arc<FrameMap>, CodecError> {
        Ok(Arc::clone(&self.map))
    }

    fn sealed(&self, frame: &FrameMap, cell: u32, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let start = frame.cell_offsets[cell as usize] as usize;
        let length = frame.directory[cell as usize].sealed_len as usize;
        out.clear();
        out.extend_from_slice(&self.bytes[start..start + length]);
        Ok(())
    }
}

impl Replay {
    pub fn read(spool: Arc<dyn Directory>, group: GroupId, key: &GroupKey, end: &LogEnd) -> Self {
        let mut replay = Self::default();
        let mut reader = LogReader::open(spool, group).unwrap();
        let mut current: Option<(IncarnationId, IncarnationKey)> = None;
        // Newest content of blocks within the incarnation: all that Same may name.
        let mut held: HashMap<Key, Vec<u8>> = HashMap::new();
        let mut in_span = false;
        while let Some(batch) = reader.next_batch(end, 1 << 20).unwrap() {
            if let Some(header) = &batch.header
                && current
                    .as_ref()
                    .is_none_or(|(id, _)| *id != header.incarnation)
            {
                let suite = Suite::try_from(header.suite).unwrap();
                let id = header.incarnation;
                let derived = IncarnationKey::derive(suite, key, group, id, &header.salt);
                current = Some((id, derived));
                replay.incarnations.push(id);
                held.clear();
            }
            let (_, key) = current.as_ref().unwrap();
            let mut bytes = &batch.frames[..];
            while !bytes.is_empty() {
                let header = FrameHeader::parse(bytes).unwrap();
                let frame = &bytes[..header.frame_len()];
                bytes = &bytes[header.frame_len()..];
                replay.frames += 1;
                verify_body(&header, &frame[256..]).unwrap();
                if header.frame_no.0 == 0 {
                    in_span &= header.flags.has(FrameFlags::IN_SPAN) || in_span;
                }
                let payload = payload_of(key, &header, frame);
                replay.apply(&header, frame, &payload, &mut held, &mut in_span);
            }
        }
        replay
    }

    fn apply(
        &mut self,
        header: &FrameHeader,
        frame: &[u8],
        payload: &[u8],
        held: &mut HashMap<Key, Vec<u8>>,
        in_span: &mut bool,
    ) {
        let table = &frame[256..256 + header.table_len as usize];
        let mut events = false;
        for placed in read_table(header, table) {
            let placed = placed.unwrap();
            let record = placed.record;
            if let Some((last, _)) = self.records.last() {
                assert!(
                    last.seq < record.seq,
                    "{:?} after {:?}",
                    record.seq,
                    last.seq
                );
                assert!(
                    last.time < record.time,
                    "{:?} after {:?}",
                    record.time,
                    last.time
                );
            }
            let mut contents = Vec::new();
            match &record.body {
                RecordBody::Write {
                    extent,
                    payload: how,
                }
                | RecordBody::Resync {
                    extent,
                    payload: how,
                } => {
                    let mut at = placed.payload_block as usize * BLOCK_SIZE;
                    for index in 0..extent.blocks {
                        let block = (extent.volume.0, extent.start.0 + index);
                        let how = match how {
                            Payload::All(how) => *how,
                            Payload::Map(map) => map[index as usize],
                        };
                        let content = match how {
                            BlockPayload::Stored => {
                                at += BLOCK_SIZE;
                                payload[at - BLOCK_SIZE..at].to_vec()
                            }
                            BlockPayload::Zero => vec![0; BLOCK_SIZE],
                            BlockPayload::Same => {
                                let write = matches!(record.body, RecordBody::Write { .. });
                                assert!(write, "a copy must be complete in itself");
                                self.same += 1;
                                held.get(&block)
                                    .expect("Same names this incarnation")
                                    .clone()
                            }
                        };
                        held.insert(block, content.clone());
                        contents.push(content);
                    }
                }
                RecordBody::Zero { extent } | RecordBody::Discard { extent } => {
                    held.retain(|(volume, block), _| {
                        *volume != extent.volume.0
                            || !(extent.start.0..extent.end().0).contains(block)
                    });
                }
                RecordBody::SpanBegin { .. } => *in_span = true,
                RecordBody::SpanEnd => *in_span = false,
                _ => {}
            }
            events |= !matches!(
                record.body,
                RecordBody::Write { .. }
                    | RecordBody::Resync { .. }
                    | RecordBody::Zero { .. }
                    | RecordBody::Discard { .. }
            );
            self.records.push((record, contents));
        }
        assert_eq!(events, header.flags.has(FrameFlags::EVENTS));
    }

    /// Content of a volume as of a seq, `size` bytes.
    pub fn image(&self, volume: u16, size: u64, upto: Seq) -> Vec<u8> {
        let blocks = size.div_ceil(BLOCK_SIZE as u64) as usize;
        let mut image = vec![0; blocks * BLOCK_SIZE];
        for (record, contents) in self.records.iter().take_while(|(r, _)| r.seq <= upto) {
            match &record.body {
                RecordBody::Write { extent, .. } | RecordBody::Resync { extent, .. }
                    if extent.volume.0 == volume =>
                {
                    for (index, content) in contents.iter().enumerate() {
                        let at = (extent.start.0 as usize + index) * BLOCK_SIZE;
                        image[at..at + BLOCK_SIZE].copy_from_slice(content);
                    }
                }
                RecordBody::Zero { extent } | RecordBody::Discard { extent }
                    if extent.volume.0 == volume =>
                {
                    let (from, to) = (extent.start.0 as usize, extent.end().0 as usize);
                    image[from * BLOCK_SIZE..to * BLOCK_SIZE].fill(0);
                }
                _ => {}
            }
        }
        assert!(
            image[size as usize..].iter().all(|byte| *byte == 0),
            "padding is zero"
        );
        image.truncate(size as usize);
        image
    }

    pub fn newest(&self, volume: u16, size: u64) -> Vec<u8> {
        self.image(volume, size, Seq(u64::MAX))
    }

    /// Whether an inconsistent span is open at the end.
    pub fn in_span(&self) -> bool {
        self.records
            .iter()
            .fold(false, |open, (record, _)| match record.body {
                RecordBody::SpanBegin { .. } => true,
                RecordBody::SpanEnd => false,
                _ => open,
            })
    }

    pub fn bodies(&self) -> impl Iterator<Item = &RecordBody> {
        self.records.iter().map(|(record, _)| &record.body)
    }
}

fn payload_of(key: &IncarnationKey, header: &FrameHeader, frame: &[u8]) -> Vec<u8> {
    let map = FrameMap::parse(frame).unwrap();
    map.authenticate(key).unwrap();
    let source = OneFrame {
        map: Arc::new(map),
        bytes: frame,
    };
    let mut payload = Vec::new();
    let mut raw = Vec::new();
    for cell in 0..(header.payload_blocks as usize).div_ceil(CELL_BLOCKS) {
        open_cell(key, &source, header.frame_no, cell as u32, &mut raw).unwrap();
        payload.extend_from_slice(&raw);
    }
    payload
}
