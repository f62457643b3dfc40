//! File names of a log directory, and which runs cover which sealed segments.

use crate::types::FrameNo;

/// Frames of one segment file, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentKey {
    pub ordinal: u32,
    pub first_frame: FrameNo,
    pub last_frame: FrameNo,
}

/// A run by its name: the first frame of its first segment and the last frame of its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunKey {
    pub first: SegmentKey,
    pub last: SegmentKey,
}

fn numbers<const N: usize>(stem: &str) -> Option<[u32; N]> {
    let mut numbers = [0; N];
    let mut parts = stem.split('-');
    for number in &mut numbers {
        let part = parts.next().filter(|part| part.len() == 8)?;
        *number = u32::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

impl SegmentKey {
    pub fn file_name(&self) -> String {
        let Self {
            ordinal,
            first_frame,
            last_frame,
        } = self;
        format!(
            "{ordinal:08x}-{:08x}-{:08x}.seg",
            first_frame.0, last_frame.0
        )
    }
}

impl RunKey {
    /// Of one segment: the segment's name. Of several: first ordinal, first frame, last ordinal,
    /// last frame.
    pub fn file_name(&self) -> String {
        let (first, last) = (&self.first, &self.last);
        if first == last {
            return format!("{}.run", first.file_name().trim_end_matches(".seg"));
        }
        format!(
            "{:08x}-{:08x}-{:08x}-{:08x}.run",
            first.ordinal, first.first_frame.0, last.ordinal, last.last_frame.0
        )
    }
}

/// What covers a stretch of the sealed segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cover {
    /// Indexes of the segments.
    pub segments: std::ops::Range<usize>,
    /// Name of the run; None if this one segment has none.
    pub run: Option<String>,
}

/// Covers `segments` (in log order) with the runs among `names`, from the oldest segment on, each
/// time by the run that reaches furthest. A run that ends inside no listed segment is not used.
pub fn cover(segments: &[SegmentKey], names: &[String]) -> Vec<Cover> {
    let held: std::collections::HashSet<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| name.strip_suffix(".run").is_some())
        .collect();
    let merged: Vec<[u32; 4]> = held
        .iter()
        .filter_map(|name| name.strip_suffix(".run").and_then(numbers))
        .collect();
    let mut covers = Vec::new();
    let mut from = 0;
    while from < segments.len() {
        let ends = reaches(segments, from, &merged);
        let found = ends.into_iter().rev().find_map(|last| {
            let key = RunKey {
                first: segments[from],
                last: segments[last],
            };
            let name = key.file_name();
            held.contains(name.as_str()).then_some((last, name))
        });
        let (last, run) = found.map_or((from, None), |(last, name)| (last, Some(name)));
        covers.push(Cover {
            segments: from..last + 1,
            run,
        });
        from = last + 1;
    }
    covers
}

/// Segments, ascending, that a run beginning at segment `from` may end with, by the merged runs.
fn reaches(segments: &[SegmentKey], from: usize, merged: &[[u32; 4]]) -> Vec<usize> {
    let first = segments[from];
    let mut ends = vec![from];
    for [ordinal, frame, last_ordinal, last_frame] in merged {
        if (*ordinal, *frame) != (first.ordinal, first.first_frame.0) {
            continue;
        }
        let end = (*last_ordinal, FrameNo(*last_frame));
        let place = segments.binary_search_by_key(&end, |key| (key.ordinal, key.last_frame));
        ends.extend(place.ok().filter(|&place| place > from));
    }
    ends.sort_unstable();
    ends
}

/// Runs among `names` that are not `used`: longer ones replace them, or a crash left them half
/// written.
pub fn superfluous<'a>(used: &[&str], names: &'a [String]) -> Vec<&'a str> {
    let stale = |name: &&str| {
        let run = name.strip_suffix(".run").is_some() && !used.contains(name);
        run || name.strip_suffix(".run.tmp").is_some()
    };
    names.iter().map(String::as_str).filter(stale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(ordinal: u32, first: u32, last: u32) -> SegmentKey {
        SegmentKey {
            ordinal,
            first_frame: FrameNo(first),
            last_frame: FrameNo(last),
        }
    }

    #[test]
    fn the_furthest_run_covers_and_the_rest_is_superfluous() {
        let segments = [
            key(1, 0, 4),
            key(1, 5, 9),
            key(2, 0, 3),
            key(2, 4, 4),
            key(2, 5, 7),
        ];
        let run = |a: usize, b: usize| {
            RunKey {
                first: segments[a],
                last: segments[b],
            }
            .file_name()
        };
        let stray = RunKey {
            first: key(1, 0, 4),
            last: key(2, 0, 2),
        }
        .file_name();
        let names = vec![
            run(0, 0),
            run(1, 1),
            run(0, 2),
            run(4, 4),
            stray.clone(),
            "00000002-00000004-00000004.run.tmp".into(),
            "MANIFEST".into(),
        ];
        let covers = cover(&segments, &names);
        let expected = [
            (0..3, Some(run(0, 2))),
            (3..4, None),
            (4..5, Some(run(4, 4))),
        ];
        let expected: Vec<Cover> = expected
            .into_iter()
            .map(|(segments, run)| Cover { segments, run })
            .collect();
        assert_eq!(covers, expected);
        let used: Vec<&str> = covers
            .iter()
            .filter_map(|cover| cover.run.as_deref())
            .collect();
        let gone = superfluous(&used, &names);
        assert_eq!(gone, [&run(0, 0), &run(1, 1), &stray, &names[5]]);
    }
}
