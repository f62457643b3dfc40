//! Which runs to merge: few runs however long the history, few rewrites of any entry.

use std::ops::Range;

/// Runs of one tier that become one of the next. Four: a lookup in n segments consults at most
/// about 3 log4(n) runs, an entry is written log4(n) times.
pub const FANOUT: usize = 4;
/// A run of more entries (1 GiB of them) is not merged again: the gain is small, the pause is not.
pub const MERGE_ENTRIES_MAX: u64 = 1 << 26;

/// What the plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunSize {
    pub segments: usize,
    pub entries: u64,
}

fn tier(size: RunSize) -> u32 {
    size.segments.max(1).ilog(FANOUT)
}

/// The next runs to merge, of runs in log order; None if all is well. Lower tiers come first: they
/// are cheap and shorten lookups most. Runs merge when `FANOUT` of one tier have come together;
/// smaller ones that lie between them go along.
pub fn plan(runs: &[RunSize]) -> Option<Range<usize>> {
    let highest = runs.iter().map(|run| tier(*run)).max()?;
    (0..=highest).find_map(|wanted| {
        let (mut start, mut alike) = (0, 0);
        for (place, run) in runs.iter().enumerate() {
            if tier(*run) > wanted || run.entries > MERGE_ENTRIES_MAX {
                (start, alike) = (place + 1, 0);
                continue;
            }
            if tier(*run) == wanted {
                // What is smaller and older than the first of them was left by something odd.
                start = if alike == 0 { place } else { start };
                alike += 1;
            }
            if alike == FANOUT {
                return Some(start..place + 1);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(segments: usize) -> RunSize {
        RunSize {
            segments,
            entries: segments as u64 * 1000,
        }
    }

    fn merge_all(runs: &mut Vec<RunSize>) -> u64 {
        let mut written = 0;
        while let Some(range) = plan(runs) {
            let merged = &runs[range.clone()];
            let segments = merged.iter().map(|run| run.segments).sum();
            let entries = merged.iter().map(|run| run.entries).sum();
            written += entries;
            runs.splice(range, [RunSize { segments, entries }]);
        }
        written
    }

    #[test]
    fn runs_stay_few_and_rewrites_rare() {
        let mut runs = Vec::new();
        let mut written = 0;
        for count in 1..=4096usize {
            runs.push(size(1));
            written += merge_all(&mut runs);
            assert_eq!(runs.iter().map(|run| run.segments).sum::<usize>(), count);
            let bound = (FANOUT - 1) * (count.ilog(FANOUT) as usize + 1);
            assert!(
                runs.len() <= bound,
                "{} runs for {count} segments",
                runs.len()
            );
        }
        assert!(written <= 4096 * 1000 * 7, "{written} entries written");
    }

    #[test]
    fn an_odd_history_is_put_in_order() {
        // As after runs were lost and built anew, one segment each.
        let mut runs: Vec<RunSize> = [16, 1, 16, 4, 1, 16, 1, 16, 1, 1].map(size).to_vec();
        merge_all(&mut runs);
        assert_eq!(
            runs.iter().map(|run| run.segments).collect::<Vec<_>>(),
            [71, 1, 1]
        );
    }

    #[test]
    fn a_huge_run_is_left_alone() {
        let huge = RunSize {
            segments: 1,
            entries: MERGE_ENTRIES_MAX + 1,
        };
        assert_eq!(plan(&[huge; 9]), None);
    }
}
