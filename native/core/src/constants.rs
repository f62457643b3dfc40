//! Every limit, in one place, with its reason.

/// Unit of history.
pub const BLOCK_SIZE: usize = 4096;
/// Unit of addressing of the front ends.
pub const SECTOR_SIZE: usize = 512;
/// Raw blocks of one cell: 64 KiB, so that a random read opens little and compression has context.
pub const CELL_BLOCKS: usize = 16;
/// Raw bytes of one whole cell.
pub const CELL_SIZE: usize = CELL_BLOCKS * BLOCK_SIZE;
/// A frame closes when its payload reaches this many blocks (1 MiB) ...
pub const FRAME_BLOCKS_TARGET: usize = 256;
/// ... and never holds more than this: the target less one block, plus one largest record.
pub const FRAME_BLOCKS_MAX: usize = FRAME_BLOCKS_TARGET - 1 + RECORD_BLOCKS_MAX;
/// A longer write becomes several records; block devices promise atomicity for far less.
pub const RECORD_BLOCKS_MAX: usize = 256;
/// Records of one frame: bounds the table that a reader must hold.
pub const FRAME_RECORDS_MAX: usize = 65_536;
/// Bytes of one encoded frame, whatever its content: what a peer may make us allocate.
pub const FRAME_BYTES_MAX: usize = 4 << 20;
/// Frames of one incarnation, well below what the 32-bit number in the nonce can hold.
pub const INCARNATION_FRAMES_MAX: u32 = 1 << 31;
/// Volume data of one incarnation before the tap starts the next.
pub const INCARNATION_BYTES_MAX: u64 = 16 << 30;
/// Age of one incarnation before the tap starts the next.
pub const INCARNATION_AGE_S: u64 = 24 * 3600;
/// A segment is sealed at this length, ...
pub const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// ... at this many records, ...
pub const SEGMENT_RECORDS_MAX: u64 = 256 * 1024;
/// ... or at this age.
pub const SEGMENT_AGE_S: u64 = 600;
/// Events that a segment brings before it is sealed early.
pub const SEGMENT_EVENTS_MAX: usize = 4096;
/// Events that a manifest lists: it is written anew with every segment, and about 4 MB then.
pub const EVENTS_MAX: usize = 32 * 1024;
/// Of these, changes of volumes, which are never left out: a log with more is refused.
pub const VOLUME_CHANGES_MAX: usize = EVENTS_MAX / 2;
/// Cells that a reader may have to open for one block, references of references included.
pub const REFERENCE_CELLS_MAX: usize = 32;
/// Raw bytes that wait for the encoder before writers are slowed.
pub const ENCODER_QUEUE_BYTES: usize = 64 << 20;
/// The least of that under a small memory limit: one largest record and what is left unused before
/// it at the ring's end, twice, so that writers and encoder need not take turns.
pub const ENCODER_QUEUE_BYTES_MIN: usize = 4 * RECORD_BLOCKS_MAX * BLOCK_SIZE;
/// Without progress for this long the encoder counts as stuck and history gets a gap.
pub const ENCODER_STUCK_MS: u64 = 2000;
/// A frame waits this long for company unless somebody waits for it.
pub const FRAME_DELAY_MS: u64 = 10;
/// Bytes of recent block contents a host keeps to complete and compare blocks.
pub const CACHE_BYTES: usize = 256 << 20;
/// Volume bytes that one bit of the write-intent bitmap stands for.
pub const REGION_BYTES: u64 = 1 << 20;
/// Seconds between two checkpoints of the write-intent bitmap.
pub const CHECKPOINT_INTERVAL_S: u64 = 30;
/// Sequence numbers reserved by one durable step of the high-water mark.
pub const SEQ_RESERVE: u64 = 1 << 20;
/// Dirty volume data that recovery re-emits at the head of the new incarnation.
pub const RECOVERY_REEMIT_BYTES: u64 = 1 << 30;
/// Regions of a volume that the copier passes over because they cannot be read whole. More is not a
/// few bad places but a device that fails: the span stays open.
pub const UNREADABLE_REGIONS_MAX: u64 = 16;
/// Seconds between two attempts to read them again: each may take a disk long.
pub const UNREADABLE_RETRY_S: u64 = 60;
/// Volumes of one group: the index is 16 bits on disk, and a group shares one order.
pub const VOLUMES_MAX: usize = 1024;
/// Largest volume: 16 TiB is asked for, 1 PiB is what 38 bits of block index hold.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// Bytes of a bookmark's label.
pub const LABEL_BYTES_MAX: usize = 255;
/// Largest read or write of an NBD client; the protocol lets clients assume 32 MiB.
pub const NBD_PAYLOAD_MAX: usize = 32 << 20;

const _: () = assert!(CELL_SIZE == 64 * 1024);
const _: () = assert!(FRAME_BLOCKS_MAX * BLOCK_SIZE < FRAME_BYTES_MAX);
const _: () = assert!(REGION_BYTES.is_multiple_of(BLOCK_SIZE as u64));
