//! Replays a block trace (`bench/traces.py`) and counts the journal bytes that an encoding makes.
//!
//! `refs_sim TRACE SCHEME [name=value]...`; schemes: `lz4_4k`, `xor_lz4_4k`, `lz4`, `zstd`,
//! `xor_zstd`, `prefix`, `copies`. `docs/codec-references.md` explains the last one and has the
//! results. It measures and is no part of the product: sizes are cast freely, and lifetimes of
//! zstd's dictionaries are stretched to the call that uses them.
#![allow(unsafe_code, clippy::pedantic, clippy::undocumented_unsafe_blocks)]

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{BufReader, Read};

const BLOCK: usize = 4096;
const SEALED: usize = 24;

#[derive(Debug, Clone)]
struct Options {
    cache: usize,
    bound: usize,
    cell: usize,
    level: i32,
    header: usize,
    delay: u64,
    /// Least bytes that an origin must give to a block.
    gain: usize,
    min_match: usize,
    min_run: usize,
    anchor_bits: u32,
    keep: u32,
    chances: u32,
    preimage: bool,
    /// Volume bytes a second that the trace's clock is stretched to; 0 leaves it.
    rate: u64,
    from: u64,
    verify: bool,
    split: bool,
    /// A cell with fewer KiB of literals than this is compressed with an earlier cell's as context.
    context: usize,
    /// That cell has at least so many KiB of literals; another is taken after so many KiB.
    context_min: usize,
    context_turn: usize,
    limit: u64,
    clear_refs: bool,
    only_after: bool,
}

#[derive(Debug, Clone, Copy)]
struct Seg {
    dst: u16,
    len: u16,
    cell: u32,
    /// In the literals of the cell.
    from: u32,
}

#[derive(Debug)]
struct Entry {
    time: u64,
    offset: u64,
    length: u64,
    kind: u8,
    fua: bool,
    data: Vec<u8>,
}

fn next_entry(reader: &mut impl Read) -> Option<Entry> {
    let mut head = [0u8; 32];
    reader.read_exact(&mut head).ok()?;
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    let kind = head[24];
    let mut data = Vec::new();
    if kind == 1 {
        data.resize(word(16) as usize, 0);
        reader.read_exact(&mut data).ok()?;
    }
    Some(Entry {
        time: word(0),
        offset: word(8),
        length: word(16),
        kind,
        fua: head[25] & 1 == 1,
        data,
    })
}

fn varint(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// Length of the common prefix.
fn common(a: &[u8], b: &[u8]) -> usize {
    let n = a.len().min(b.len());
    let mut at = 0;
    while at + 8 <= n {
        let x = u64::from_le_bytes(a[at..at + 8].try_into().unwrap());
        let y = u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
        if x != y {
            return at + ((x ^ y).trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    while at < n && a[at] == b[at] {
        at += 1;
    }
    at
}

fn common_back(a: &[u8], b: &[u8]) -> usize {
    let n = a.len().min(b.len());
    let mut at = 0;
    while at < n && a[a.len() - 1 - at] == b[b.len() - 1 - at] {
        at += 1;
    }
    at
}

struct Zstd {
    context: zstd_safe::CCtx<'static>,
    dictionary: Option<Box<zstd_safe::CDict<'static>>>,
}

impl Zstd {
    fn new(level: i32) -> Self {
        use zstd_safe::CParameter as P;
        let mut context = zstd_safe::CCtx::create();
        context.set_parameter(P::CompressionLevel(level)).unwrap();
        context.set_parameter(P::ContentSizeFlag(false)).unwrap();
        context.set_parameter(P::ChecksumFlag(false)).unwrap();
        context.set_parameter(P::DictIdFlag(false)).unwrap();
        context
            .set_parameter(P::Format(zstd_safe::FrameFormat::Magicless))
            .unwrap();
        Self {
            context,
            dictionary: None,
        }
    }

    fn len(&mut self, data: &[u8], out: &mut Vec<u8>) -> usize {
        out.clear();
        out.reserve(zstd_safe::compress_bound(data.len()));
        self.context.compress2(out, data).unwrap().min(data.len())
    }

    fn set_dictionary(&mut self, content: &[u8], level: i32) {
        self.dictionary = Some(Box::new(zstd_safe::create_cdict(content, level)));
    }

    fn len_with_dictionary(&mut self, data: &[u8], out: &mut Vec<u8>) -> usize {
        out.clear();
        out.reserve(zstd_safe::compress_bound(data.len()));
        let dictionary = self.dictionary.as_deref().unwrap();
        // It is taken away again before another can replace it.
        let dictionary: &'static zstd_safe::CDict<'static> =
            unsafe { std::mem::transmute(dictionary) };
        self.context.ref_cdict(dictionary).unwrap();
        let len = self.context.compress2(out, data).unwrap().min(data.len());
        self.context.disable_dictionary().unwrap();
        len
    }

    fn len_prefixed(&mut self, prefix: &[u8], data: &[u8], out: &mut Vec<u8>) -> usize {
        out.clear();
        out.reserve(zstd_safe::compress_bound(data.len()));
        // The prefix is used by the next call only, and outlives it.
        let prefix: &'static [u8] = unsafe { std::mem::transmute(prefix) };
        self.context.ref_prefix(prefix).unwrap();
        self.context.compress2(out, data).unwrap().min(data.len())
    }
}

fn lz4(data: &[u8], out: &mut Vec<u8>) -> usize {
    out.resize(data.len() + data.len() / 200 + 64, 0);
    let n = unsafe {
        lz4_sys::LZ4_compress_default(
            data.as_ptr().cast(),
            out.as_mut_ptr().cast(),
            data.len() as i32,
            out.len() as i32,
        )
    };
    (n as usize).min(data.len())
}

/// Processor time of this thread: the machine may be shared.
fn cpu_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

const GEAR: [u64; 256] = {
    let mut table = [0u64; 256];
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut i = 0;
    while i < 256 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        table[i] = z ^ (z >> 31);
        i += 1;
    }
    table
};
/// Bytes of an anchor: two bits of the hash are shifted out a byte.
const WINDOW: usize = 32;

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    /// In the ring; `GONE` if the literals are no longer there.
    start: u64,
    len: u32,
    sealed: u32,
    /// The cell whose literals must be known to decompress this one's; itself if none.
    context: u32,
    /// Bytes that others copied since the literals were put there.
    used: u32,
}

const GONE: u64 = u64::MAX;

#[derive(Debug, Clone, Copy)]
struct Match {
    dst: usize,
    len: usize,
    cell: u32,
    from: u32,
}

/// Literals of recent cells, their anchors, and where the bytes of recent blocks lie.
struct Copies {
    ring: Vec<u8>,
    head: u64,
    /// Cells whose literals lie in the ring, oldest first.
    order: VecDeque<u32>,
    /// Anchor -> cell (32 bits), offset behind the anchor (20), more of its hash (12).
    index: Vec<u64>,
    index_bits: u32,
    cells: Vec<Cell>,
    places: HashMap<u64, Box<[Seg]>>,
    swept: u64,
    keep: u32,
    chances: u32,
}

const EMPTY: u64 = u64::MAX;

impl Copies {
    fn new(cache: usize, anchor_bits: u32, keep: u32, chances: u32) -> Self {
        let index_bits = (cache >> anchor_bits).next_power_of_two().trailing_zeros();
        Self {
            // Not zero: the pages are touched here, not in what is timed.
            ring: vec![1; cache],
            head: 0,
            order: VecDeque::new(),
            index: vec![EMPTY; 1 << index_bits],
            index_bits,
            cells: Vec::new(),
            places: HashMap::new(),
            swept: 0,
            keep,
            chances,
        }
    }

    fn there(&self, cell: u32) -> bool {
        self.cells[cell as usize].start != GONE
    }

    /// Whether the whole content of a block is in the cache.
    fn holds(&self, block: u64) -> bool {
        let place = self.places.get(&block);
        place.is_some_and(|segs| segs.iter().all(|seg| self.there(seg.cell)))
    }

    /// Literals of a cell that is there.
    fn literals(&self, cell: u32) -> &[u8] {
        let Cell { start, len, .. } = self.cells[cell as usize];
        let at = (start % self.ring.len() as u64) as usize;
        &self.ring[at..at + len as usize]
    }

    fn slot(&self, hash: u64) -> usize {
        (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - self.index_bits)) as usize
    }

    fn prefetch(&self, hash: u64) {
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.index.as_ptr().add(self.slot(hash)).cast());
        }
    }

    /// The next `len` bytes of the ring, contiguous, and who is in their way.
    fn space(&self, len: usize) -> u64 {
        let size = self.ring.len() as u64;
        if self.head % size + len as u64 > size {
            self.head.next_multiple_of(size)
        } else {
            self.head
        }
    }

    /// Puts literals of `cell` into the ring. Cells that others copied from go on to the front;
    /// after each such cell the next one goes whatever it gave, for a loop longer than the cache
    /// would keep all.
    fn insert(&mut self, cell: u32, literals: &[u8]) {
        let size = self.ring.len() as u64;
        let mut chances = self.chances;
        let mut held: Vec<(u32, Vec<u8>)> = vec![(cell, literals.to_vec())];
        while let Some((cell, bytes)) = held.pop() {
            let start = self.space(bytes.len());
            let end = start + bytes.len() as u64;
            while let Some(&old) = self.order.front() {
                let victim = self.cells[old as usize];
                if victim.start + size >= end {
                    break;
                }
                self.order.pop_front();
                let stays = self.keep > 0
                    && chances > 0
                    && u64::from(victim.used) * 100 >= u64::from(victim.len) * u64::from(self.keep);
                if stays {
                    chances -= 1;
                    held.push((old, self.literals(old).to_vec()));
                } else {
                    self.cells[old as usize].start = GONE;
                }
            }
            let at = (start % size) as usize;
            self.ring[at..at + bytes.len()].copy_from_slice(&bytes);
            self.cells[cell as usize].start = start;
            self.cells[cell as usize].used = 0;
            self.head = end;
            self.order.push_back(cell);
        }
    }
}

/// Where the first run of at least `min` equal bytes begins.
fn next_run(x: &[u8], y: &[u8], min: usize) -> Option<usize> {
    let mut at = 0;
    while at + min <= x.len() {
        let len = common(&x[at..], &y[at..]);
        if len >= min {
            return Some(at);
        }
        at += len + 1;
    }
    None
}

/// Equal runs of `x` and `y` (same length), at least `min` long: calls `each(at, len)`.
fn runs(x: &[u8], y: &[u8], min: usize, mut each: impl FnMut(usize, usize)) {
    let mut at = 0;
    let n = x.len();
    while at < n {
        let len = common(&x[at..], &y[at..]);
        if len >= min {
            each(at, len);
        }
        at += len;
        // Skip the difference, eight bytes at a time while no byte agrees for long.
        at += 1;
    }
}

fn gap_class(len: usize) -> usize {
    match len {
        0..16 => 0,
        16..64 => 1,
        64..512 => 2,
        512..4096 => 3,
        _ => 4,
    }
}

#[derive(Default)]
struct Totals {
    app: u64,
    stored: u64,
    journal: u64,
    frames: u64,
    cells: u64,
    headers: u64,
    tables: u64,
    overhead: u64,
    literals: u64,
    literal_bytes: u64,
    commands: u64,
    refs: u64,
    same: u64,
    zero: u64,
    ns: u64,
    copied: u64,
    pieces: u64,
    gaps: [u64; 5],
    window: (u64, u64),
    opens: Vec<u32>,
    read_ns: Vec<u32>,
}

/// Block, content, pre-image where the scheme wants it.
type Stored = (u64, Vec<u8>, Option<Vec<u8>>);

struct Sim {
    options: Options,
    image: Vec<u8>,
    known: HashSet<u64>,
    total: Totals,
    zstd: Zstd,
    out: Vec<u8>,
    copies: Copies,
    counting: bool,
    recent: Prefix,
    lits: Vec<u8>,
    commands: [Vec<u8>; 3],
    /// The cell that gives context at present, and bytes of literals since it was chosen.
    context: (u32, usize),
    found: Vec<Match>,
    anchors: Vec<(usize, u64)>,
    extra: Vec<u8>,
}

/// The scheme `prefix`: raw ring of cells, votes, zstd against whole referenced blocks.
#[derive(Default)]
struct Prefix {
    ring: Vec<u8>,
    closures: HashMap<u64, Vec<u32>>,
    newest: HashMap<u64, u64>,
    index: HashMap<u64, u64>,
    stored: u64,
    next_cell: u32,
}

impl Sim {
    fn new(options: Options, size: usize) -> Self {
        let copies = Copies::new(
            options.cache,
            options.anchor_bits,
            options.keep,
            options.chances,
        );
        let recent = Prefix {
            ring: vec![0; options.cache],
            ..Prefix::default()
        };
        Self {
            zstd: Zstd::new(options.level),
            image: vec![0; size],
            known: HashSet::new(),
            total: Totals::default(),
            out: Vec::new(),
            copies,
            counting: true,
            recent,
            options,
            lits: Vec::new(),
            commands: Default::default(),
            context: (u32::MAX, 0),
            found: Vec::new(),
            anchors: Vec::new(),
            extra: Vec::new(),
        }
    }

    fn block(&self, block: u64) -> &[u8] {
        let at = block as usize * BLOCK;
        &self.image[at..at + BLOCK]
    }

    fn frame(&mut self, scheme: &str, records: &[Entry]) {
        if records.is_empty() {
            return;
        }
        let mut table = 0;
        let (mut time, mut end) = (records[0].time, 0u64);
        let mut stored: Vec<Stored> = Vec::new();
        let xor = scheme.starts_with("xor");
        let mut app = 0;
        for record in records {
            table += 1 + varint(record.time.saturating_sub(time).max(1));
            time = record.time;
            if record.kind == 4 {
                continue;
            }
            let first = record.offset / BLOCK as u64;
            let last = (record.offset + record.length).div_ceil(BLOCK as u64);
            table += varint(zigzag(first as i64 - end as i64)) + varint(last - first);
            end = last;
            if record.kind != 1 {
                let range = record.offset as usize..(record.offset + record.length) as usize;
                self.image[range].fill(0);
                for block in first..last {
                    self.known.insert(block);
                    self.copies.places.remove(&block);
                }
                continue;
            }
            app += record.length;
            let mut codes = [false; 3];
            let from = first as usize * BLOCK;
            let until = last as usize * BLOCK;
            let before = self.image[from..until].to_vec();
            let at = record.offset as usize;
            self.image[at..at + record.data.len()].copy_from_slice(&record.data);
            for block in first..last {
                let content = self.block(block);
                let old = &before[(block - first) as usize * BLOCK..][..BLOCK];
                let was_known =
                    self.known.contains(&block) && (scheme != "copies" || self.copies.holds(block));
                if content.iter().all(|&b| b == 0) {
                    codes[1] = true;
                    self.total.zero += u64::from(self.counting);
                    self.known.insert(block);
                    self.copies.places.remove(&block);
                    continue;
                }
                if content == old && was_known {
                    codes[2] = true;
                    self.total.same += u64::from(self.counting);
                    continue;
                }
                codes[0] = true;
                let old = (xor && was_known).then(|| old.to_vec());
                stored.push((block, content.to_vec(), old));
                self.known.insert(block);
            }
            if codes.iter().filter(|&&c| c).count() > 1 {
                table += (last - first).div_ceil(4) as usize;
            }
        }
        let mut cells_len = 0;
        let (mut overhead, mut cells) = (0, 0);
        let begun = cpu_ns();
        let per_cell = if scheme.ends_with("4k") {
            1
        } else {
            self.options.cell / BLOCK
        };
        for group in stored.chunks(per_cell) {
            cells += 1;
            let raw: Vec<u8> = group
                .iter()
                .filter(|_| scheme != "copies")
                .flat_map(|(_, content, old)| {
                    let mut content = content.clone();
                    if let Some(old) = old {
                        content.iter_mut().zip(old).for_each(|(c, o)| *c ^= o);
                    }
                    content
                })
                .collect();
            let (len, extra) = match scheme.trim_start_matches("xor_") {
                "lz4_4k" | "lz4" => (lz4(&raw, &mut self.out), 0),
                "zstd" => (self.zstd.len(&raw, &mut self.out), 0),
                "copies" => self.copies_cell(group),
                "prefix" => self.prefix_cell(group, &raw),
                _ => panic!("unknown scheme"),
            };
            cells_len += len;
            // The 4 KiB schemes are the literature's: blocks of a common cell, no tag each.
            overhead += extra + if per_cell == 1 { 2 } else { SEALED + 5 };
        }
        let took = cpu_ns() - begun;
        if !self.counting {
            return;
        }
        let total = &mut self.total;
        total.ns += took;
        total.app += app;
        total.stored += stored.len() as u64;
        total.frames += 1;
        total.cells += cells;
        total.headers += self.options.header as u64;
        total.tables += table as u64;
        total.overhead += overhead as u64;
        total.journal += (self.options.header + table + overhead + cells_len) as u64;
        let (from, journal) = total.window;
        if total.app - from > 500 << 20 {
            let ratio = (total.app - from) as f64 / (total.journal - journal) as f64;
            eprint!("{ratio:.1} ");
            total.window = (total.app, total.journal);
        }
    }

    /// Compressed length of one cell with copies from the literals of earlier cells, and the bytes
    /// of its references.
    fn copies_cell(&mut self, group: &[Stored]) -> (usize, usize) {
        let id = self.copies.cells.len() as u32;
        self.lits.clear();
        self.commands.iter_mut().for_each(Vec::clear);
        let mut origins: Vec<u32> = Vec::new();
        let mut diagonals: Vec<i64> = Vec::new();
        let mut places: Vec<(u64, Vec<Seg>)> = Vec::with_capacity(group.len());
        let mut pending_lits = 0usize;
        for (block, content, _) in group {
            self.find(*block, content);
            self.choose();
            let mut segs: Vec<Seg> = Vec::with_capacity(self.found.len() * 2 + 1);
            let mut at = 0;
            for m in &self.found {
                if m.dst > at {
                    self.total.gaps[gap_class(m.dst - at)] += (m.dst - at) as u64;
                    let from = self.lits.len() as u32;
                    segs.push(Seg {
                        dst: at as u16,
                        len: (m.dst - at) as u16,
                        cell: id,
                        from,
                    });
                    self.lits.extend_from_slice(&content[at..m.dst]);
                    pending_lits += m.dst - at;
                }
                let origin = match origins.iter().position(|&o| o == m.cell) {
                    Some(at) => at,
                    None => {
                        origins.push(m.cell);
                        diagonals.push(i64::MIN);
                        origins.len() - 1
                    }
                };
                let from = i64::from(m.from);
                self.copies.cells[m.cell as usize].used += m.len as u32;
                let diagonal = from - m.dst as i64;
                put_varint(&mut self.commands[0], pending_lits as u64);
                put_varint(&mut self.commands[1], m.len as u64);
                // Place: origin, and whether it goes on along the diagonal.
                let same = diagonals[origin] == diagonal;
                put_varint(
                    &mut self.commands[2],
                    (origin as u64) << 1 | u64::from(!same),
                );
                if !same {
                    put_varint(&mut self.extra, from as u64);
                }
                diagonals[origin] = diagonal;
                pending_lits = 0;
                segs.push(Seg {
                    dst: m.dst as u16,
                    len: m.len as u16,
                    cell: m.cell,
                    from: m.from,
                });
                at = m.dst + m.len;
                if self.counting {
                    self.total.copied += m.len as u64;
                    self.total.pieces += 1;
                }
            }
            if at < BLOCK {
                self.total.gaps[gap_class(BLOCK - at)] += (BLOCK - at) as u64;
                let from = self.lits.len() as u32;
                segs.push(Seg {
                    dst: at as u16,
                    len: (BLOCK - at) as u16,
                    cell: id,
                    from,
                });
                self.lits.extend_from_slice(&content[at..]);
                pending_lits += BLOCK - at;
            }
            places.push((*block, segs));
        }
        // References: cells counted back, ascending.
        let mut sorted = origins.clone();
        sorted.sort_unstable();
        let mut refs = Vec::new();
        let mut before = id;
        for &cell in sorted.iter().rev() {
            put_varint(&mut refs, u64::from(before - cell));
            before = cell;
        }
        // Frames back and cell: a byte more each than the distance in cells.
        let clear = if self.options.clear_refs {
            refs.len() + origins.len()
        } else {
            0
        };
        let mut commands: Vec<u8> = Vec::new();
        if !self.options.clear_refs {
            commands.extend_from_slice(&refs);
            commands.extend(origins.iter().map(|_| 1u8));
        }
        for stream in &self.commands {
            commands.extend_from_slice(stream);
        }
        commands.extend_from_slice(&self.extra);
        self.extra.clear();
        let (len, lits_len, commands_len);
        let mut uses = id;
        if self.options.split {
            commands_len = self.zstd.len(&commands, &mut self.out).min(commands.len()) + 2;
            let lits = std::mem::take(&mut self.lits);
            let (key, since) = self.context;
            let small = lits.len() < self.options.context << 10 && !lits.is_empty();
            if small && key != u32::MAX && self.copies.there(key) {
                lits_len = self.zstd.len_with_dictionary(&lits, &mut self.out) + 2;
                uses = key;
            } else {
                lits_len = self.zstd.len(&lits, &mut self.out) + 2;
                let due = since > self.options.context_turn << 10
                    || key == u32::MAX
                    || !self.copies.there(key);
                if due && self.options.context > 0 && lits.len() >= self.options.context_min << 10 {
                    self.zstd.set_dictionary(&lits, self.options.level);
                    self.context = (id, 0);
                }
            }
            self.context.1 += lits.len();
            self.lits = lits;
            len = commands_len + lits_len;
        } else {
            lits_len = 0;
            let mut all = std::mem::take(&mut self.lits);
            let n = all.len();
            all.extend_from_slice(&commands);
            len = self.zstd.len(&all, &mut self.out) + 4;
            commands_len = len;
            all.truncate(n);
            self.lits = all;
        }
        self.keep(id, uses, places, len, group);
        if self.counting {
            self.total.literals += lits_len as u64;
            self.total.literal_bytes += self.lits.len() as u64;
            self.total.commands += commands_len as u64;
            self.total.refs += origins.len() as u64;
        }
        (len, clear)
    }

    /// Puts the cell's literals into the cache and notes where its blocks' bytes are.
    fn keep(
        &mut self,
        id: u32,
        context: u32,
        places: Vec<(u64, Vec<Seg>)>,
        sealed: usize,
        group: &[Stored],
    ) {
        let copies = &mut self.copies;
        copies.cells.push(Cell {
            start: GONE,
            len: self.lits.len() as u32,
            sealed: sealed as u32,
            context,
            used: 0,
        });
        copies.insert(id, &self.lits);
        let mask = !0u64 << (64 - self.options.anchor_bits);
        let mut hash = 0u64;
        for (at, &byte) in self.lits.iter().enumerate() {
            hash = (hash << 2).wrapping_add(GEAR[byte as usize]);
            if hash & mask == 0 && at + 1 >= WINDOW {
                let slot = copies.slot(hash);
                copies.index[slot] =
                    u64::from(id) << 32 | (at as u64 + 1) << 12 | hash >> 8 & 0xfff;
            }
        }
        for (block, segs) in places {
            let mut cells: Vec<u32> = Vec::with_capacity(8);
            for seg in &segs {
                for cell in [seg.cell, copies.cells[seg.cell as usize].context] {
                    if !cells.contains(&cell) {
                        cells.push(cell);
                    }
                }
            }
            if self.counting {
                let total = &mut self.total;
                total
                    .opens
                    .push(cells.len() as u32 + u32::from(!cells.contains(&id)));
                let mut ns = 0;
                for &cell in &cells {
                    let cell = copies.cells[cell as usize];
                    // Open: 2 us, AES-GCM at 4 GB/s; literals through zstd at 1 GB/s.
                    ns += 2000 + cell.sealed / 4 + cell.len;
                }
                total.read_ns.push(ns);
            }
            if self.options.verify {
                let content = &group.iter().rev().find(|(b, _, _)| *b == block).unwrap().1;
                if group.iter().filter(|(b, _, _)| *b == block).count() == 1 {
                    for seg in &segs {
                        let want = &content[seg.dst as usize..][..seg.len as usize];
                        let literals = copies.literals(seg.cell);
                        assert_eq!(&literals[seg.from as usize..][..seg.len as usize], want);
                    }
                    assert_eq!(segs.iter().map(|s| s.len as usize).sum::<usize>(), BLOCK);
                    assert!(cells.len() + usize::from(!cells.contains(&id)) <= self.options.bound);
                }
            }
            copies.places.insert(block, segs.into());
        }
        // Blocks whose bytes are all gone need no place; looked at a few times a turn of the ring.
        if copies.head - copies.swept > copies.ring.len() as u64 / 4 {
            copies.swept = copies.head;
            let cells = &copies.cells;
            copies.places.retain(|_, segs| {
                segs.iter()
                    .any(|seg| cells[seg.cell as usize].start != GONE)
            });
        }
    }

    /// Fills `found` with copies that cover parts of `content`, in order, without overlap.
    fn find(&mut self, block: u64, content: &[u8]) {
        let found = &mut self.found;
        found.clear();
        let copies = &self.copies;
        if let Some(segs) = copies.places.get(&block).filter(|_| self.options.preimage) {
            for seg in segs.iter().filter(|seg| copies.there(seg.cell)) {
                let to = seg.dst as usize;
                let old = &copies.literals(seg.cell)[seg.from as usize..][..seg.len as usize];
                runs(
                    &content[to..to + old.len()],
                    old,
                    self.options.min_run,
                    |at, len| {
                        let from = seg.from + at as u32;
                        found.push(Match {
                            dst: to + at,
                            len,
                            cell: seg.cell,
                            from,
                        });
                    },
                );
            }
        }
        // What is between them, by anchors.
        let before = std::mem::take(&mut self.found);
        let end = Match {
            dst: BLOCK,
            len: 0,
            cell: 0,
            from: 0,
        };
        let mut at = 0;
        for m in before.iter().copied().chain([end]) {
            if m.dst >= at + WINDOW {
                self.search(content, at, m.dst);
            }
            if m.len > 0 {
                self.found.push(m);
            }
            at = m.dst + m.len;
        }
    }

    fn search(&mut self, content: &[u8], begin: usize, until: usize) {
        let copies = &self.copies;
        let mask = !0u64 << (64 - self.options.anchor_bits);
        self.anchors.clear();
        let mut hash = 0u64;
        for at in begin..until {
            hash = (hash << 2).wrapping_add(GEAR[content[at] as usize]);
            if hash & mask == 0 && at + 1 >= begin + WINDOW {
                copies.prefetch(hash);
                self.anchors.push((at + 1, hash));
            }
        }
        let mut free = begin;
        for &(at, hash) in &self.anchors {
            if at < free + WINDOW {
                continue;
            }
            let hit = copies.index[copies.slot(hash)];
            if hit == EMPTY || hit & 0xfff != hash >> 8 & 0xfff {
                continue;
            }
            let (cell, behind) = ((hit >> 32) as u32, (hit >> 12 & 0xf_ffff) as usize);
            if !copies.there(cell) {
                continue;
            }
            let literals = copies.literals(cell);
            let back = common_back(&content[free..at], &literals[..behind]);
            if back < WINDOW {
                continue;
            }
            let ahead = common(&content[at..until], &literals[behind..]);
            if back + ahead < self.options.min_match {
                continue;
            }
            let from = (behind - back) as u32;
            self.found.push(Match {
                dst: at - back,
                len: back + ahead,
                cell,
                from,
            });
            // After a small change the same origin often goes on.
            let (mut to, mut src) = (at + ahead, behind + ahead);
            free = to;
            while to < until && src < literals.len() {
                let len = (until - to).min(literals.len() - src).min(96);
                let Some(skip) = next_run(
                    &content[to..to + len],
                    &literals[src..src + len],
                    self.options.min_run,
                ) else {
                    break;
                };
                to += skip;
                src += skip;
                let len = common(&content[to..until], &literals[src..]);
                self.found.push(Match {
                    dst: to,
                    len,
                    cell,
                    from: src as u32,
                });
                to += len;
                src += len;
                free = to;
            }
        }
    }

    /// Leaves out origins beyond the bound, and those that give too little.
    fn choose(&mut self) {
        let mut bytes: Vec<(usize, u32)> = Vec::with_capacity(16);
        for m in &self.found {
            match bytes.iter_mut().find(|(_, cell)| *cell == m.cell) {
                Some((sum, _)) => *sum += m.len,
                None => bytes.push((m.len, m.cell)),
            }
        }
        bytes.sort_unstable_by(|a, b| b.cmp(a));
        bytes.retain(|(sum, _)| *sum >= self.options.gain);
        // Beside this cell and its context.
        let mut cells: Vec<u32> = Vec::with_capacity(16);
        bytes.retain(|(_, cell)| {
            let held = cells.len();
            for cell in [*cell, self.copies.cells[*cell as usize].context] {
                if !cells.contains(&cell) {
                    cells.push(cell);
                }
            }
            let fits = cells.len() + 2 <= self.options.bound;
            if !fits {
                cells.truncate(held);
            }
            fits
        });
        self.found
            .retain(|m| bytes.iter().any(|(_, cell)| *cell == m.cell));
    }

    /// zstd against whole earlier blocks, chosen by votes; what a read opens is counted by cell.
    fn prefix_cell(&mut self, group: &[Stored], raw: &[u8]) -> (usize, usize) {
        let recent = &mut self.recent;
        let slots = (recent.ring.len() / BLOCK) as u64;
        let oldest = recent.stored.saturating_sub(slots - 512);
        let mask = !0u64 << (64 - self.options.anchor_bits);
        let mut votes: HashMap<u64, u32> = HashMap::new();
        for (block, _, _) in group {
            if let Some(&slot) = recent.newest.get(block).filter(|&&slot| slot >= oldest) {
                *votes.entry(slot).or_default() += 16;
            }
        }
        let mut hash = 0u64;
        let mut anchors = Vec::new();
        for (at, &byte) in raw.iter().enumerate() {
            hash = (hash << 2).wrapping_add(GEAR[byte as usize]);
            if hash & mask == 0 && at >= WINDOW {
                if let Some(&slot) = recent.index.get(&hash).filter(|&&slot| slot >= oldest) {
                    *votes.entry(slot).or_default() += 1;
                }
                anchors.push((hash, at / BLOCK));
            }
        }
        let mut votes: Vec<(u32, u64)> = votes.into_iter().map(|(s, v)| (v, s)).collect();
        votes.sort_unstable_by(|a, b| b.cmp(a));
        let id = recent.next_cell;
        recent.next_cell += 1;
        let mut closure = vec![id];
        let mut prefix: Vec<u8> = Vec::new();
        let mut refs = 0;
        for (weight, slot) in votes.into_iter().take(64) {
            if weight < 2 {
                break;
            }
            let Some(needs) = recent.closures.get(&slot) else {
                continue;
            };
            let new: Vec<u32> = needs
                .iter()
                .copied()
                .filter(|c| !closure.contains(c))
                .collect();
            if closure.len() + new.len() > self.options.bound {
                continue;
            }
            closure.extend(new);
            let at = (slot % slots) as usize * BLOCK;
            prefix.extend_from_slice(&recent.ring[at..at + BLOCK]);
            refs += 1;
        }
        let len = if prefix.is_empty() {
            self.zstd.len(raw, &mut self.out)
        } else {
            self.zstd.len_prefixed(&prefix, raw, &mut self.out)
        };
        if self.counting {
            self.total.refs += refs;
            self.total
                .opens
                .extend(group.iter().map(|_| closure.len() as u32));
        }
        for (block, content, _) in group {
            let slot = recent.stored;
            let at = (slot % slots) as usize * BLOCK;
            recent.ring[at..at + BLOCK].copy_from_slice(content);
            recent.closures.insert(slot, closure.clone());
            if slot >= slots {
                recent.closures.remove(&(slot - slots));
            }
            recent.newest.insert(*block, slot);
            recent.stored += 1;
        }
        let first = recent.stored - group.len() as u64;
        for (hash, block) in anchors {
            recent.index.insert(hash, first + block as u64);
        }
        (len, refs as usize * 5)
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (trace, scheme) = (&arguments[0], arguments[1].as_str());
    let mut o = Options {
        cache: 1 << 30,
        bound: 32,
        cell: 1 << 16,
        level: 1,
        header: 256,
        delay: 10_000,
        gain: 64,
        min_match: 32,
        min_run: 24,
        anchor_bits: 5,
        keep: 1,
        chances: 1,
        preimage: true,
        rate: 0,
        from: 0,
        verify: false,
        split: true,
        context: 0,
        context_min: 8,
        context_turn: 1024,
        limit: u64::MAX,
        clear_refs: false,
        only_after: true,
    };
    for word in &arguments[2..] {
        let (name, value) = word.split_once('=').expect("name=value");
        let number: i64 = value.parse().expect("a number");
        match name {
            "cache" => o.cache = (number as usize) << 20,
            "bound" => o.bound = number as usize,
            "cell" => o.cell = (number as usize) << 10,
            "level" => o.level = number as i32,
            "header" => o.header = number as usize,
            "delay" => o.delay = number as u64,
            "gain" => o.gain = number as usize,
            "match" => o.min_match = number as usize,
            "run" => o.min_run = number as usize,
            "anchor" => o.anchor_bits = number as u32,
            "chances" => o.chances = number as u32,
            "keep" => o.keep = number as u32,
            "preimage" => o.preimage = number != 0,
            "rate" => o.rate = number as u64,
            "from" => o.from = number as u64,
            "verify" => o.verify = number != 0,
            "split" => o.split = number != 0,
            "context" => o.context = number as usize,
            "context_min" => o.context_min = number as usize,
            "context_turn" => o.context_turn = number as usize,
            "limit" => o.limit = (number as u64) << 20,
            "clear" => o.clear_refs = number != 0,
            "cold" => o.only_after = number != 0,
            _ => panic!("unknown option {name}"),
        }
    }
    if o.from == 0 {
        let about = std::fs::read_to_string(trace.replace(".trace", ".json")).unwrap_or_default();
        let number = about
            .split("\"load_from_us\": ")
            .nth(1)
            .and_then(|rest| rest.split(',').next());
        o.from = number.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
    }
    let file = File::open(trace).expect("the trace");
    // Pass one: average rate of the load.
    let mut stretch = 1.0;
    if o.rate > 0 {
        let mut reader = BufReader::with_capacity(1 << 20, &file);
        reader.read_exact(&mut [0; 16]).unwrap();
        let (mut bytes, mut first, mut last) = (0u64, 0, 0);
        while let Some(entry) = next_entry(&mut reader) {
            if entry.time >= o.from && entry.kind == 1 {
                first = if first == 0 { entry.time } else { first };
                last = entry.time;
                bytes += entry.length;
            }
        }
        stretch = bytes as f64 / o.rate as f64 / ((last - first).max(1) as f64 / 1e6);
    }
    let file = File::open(trace).expect("the trace");
    let mut reader = BufReader::with_capacity(1 << 20, file);
    reader.read_exact(&mut [0; 16]).unwrap();
    let mut sim = Sim::new(o.clone(), 8 << 30);
    let mut waiting: Vec<Entry> = Vec::new();
    let (mut waiting_bytes, mut opened) = (0u64, 0u64);
    while let Some(mut entry) = next_entry(&mut reader) {
        if entry.time < o.from && o.only_after {
            let (at, n) = (entry.offset as usize, entry.length as usize);
            match entry.kind {
                1 => sim.image[at..at + n].copy_from_slice(&entry.data),
                2 | 3 => sim.image[at..at + n].fill(0),
                _ => {}
            }
            continue;
        }
        sim.counting = entry.time >= o.from;
        entry.time = (entry.time as f64 * stretch) as u64;
        if !waiting.is_empty() && entry.time - opened.min(entry.time) > o.delay {
            sim.frame(scheme, &waiting);
            waiting.clear();
            waiting_bytes = 0;
        }
        if sim.total.app > o.limit {
            break;
        }
        if waiting.is_empty() {
            if entry.kind == 4 {
                continue;
            }
            opened = entry.time;
        }
        let flush = entry.kind == 4 || entry.fua;
        waiting_bytes += entry.data.len() as u64;
        waiting.push(entry);
        if flush || waiting_bytes >= 1 << 20 {
            sim.frame(scheme, &waiting);
            waiting.clear();
            waiting_bytes = 0;
        }
    }
    sim.frame(scheme, &waiting);
    let t = &mut sim.total;
    let percentile = |values: &mut Vec<u32>, p: usize| {
        values.sort_unstable();
        values
            .get((values.len() * p / 100).min(values.len().saturating_sub(1)))
            .copied()
            .unwrap_or(0)
    };
    let app = t.app as f64;
    let rate = app / 1e9 / (t.ns as f64 / 1e9);
    println!(
        "{scheme} {} ratio {:.2} app {:.0} MB journal {:.1} MB frames {} ({:.0} B) rate {:.2} GB/s \
         | header {:.1} table {:.1} cell+refs {:.1} lits {:.1} (raw {:.0}) cmds {:.1} MB \
         | stored {} same {} zero {} | copied {:.0} MB pieces/blk {:.1} refs/cell {:.1} \
         | opens p50 {} p90 {} p99 {} max {} read us p50 {} p99 {} | segs {:.0} MB gaps {:?}",
        arguments[2..].join(" "),
        app / t.journal as f64,
        app / 1e6,
        t.journal as f64 / 1e6,
        t.frames,
        app / t.frames.max(1) as f64,
        rate,
        t.headers as f64 / 1e6,
        t.tables as f64 / 1e6,
        t.overhead as f64 / 1e6,
        t.literals as f64 / 1e6,
        t.literal_bytes as f64 / 1e6,
        t.commands as f64 / 1e6,
        t.stored,
        t.same,
        t.zero,
        t.copied as f64 / 1e6,
        t.pieces as f64 / t.stored.max(1) as f64,
        t.refs as f64 / t.cells.max(1) as f64,
        percentile(&mut t.opens, 50),
        percentile(&mut t.opens, 90),
        percentile(&mut t.opens, 99),
        percentile(&mut t.opens, 100),
        percentile(&mut t.read_ns, 50) / 1000,
        percentile(&mut t.read_ns, 99) / 1000,
        sim.copies
            .places
            .values()
            .map(|s| s.len() * 16 + 32)
            .sum::<usize>() as f64
            / 1e6,
        t.gaps.map(|bytes| bytes / 1_000_000),
    );
}
