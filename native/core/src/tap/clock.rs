//! Time of the records: the boot clock anchored to the wall clock.
//!
//! Differences of up to a second are slewed at 500 ppm. A step of the wall clock of more than a
//! second is reported (a CLOCK_STEP record and an alarm); forward it is followed at once, backward
//! by running at half speed until the wall clock has caught up: time never goes back.

use std::fmt::Debug;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::ClockId;

/// Slew for small differences: far above the drift of a crystal, invisible to people.
const SLEW_PPM: i64 = 500;
/// Slew while ours runs ahead by more than a second.
const CATCH_UP_PPM: i64 = -500_000;
/// A change of (wall - boot) of more than this between two looks is a step.
const STEP_US: i64 = 1_000_000;
/// Time over which a small difference is made good.
const SLEW_OVER_US: i64 = 10_000_000;

/// Where times come from.
pub trait TimeSource: Send + Sync + Debug {
    /// Microseconds since boot, suspended time included. Never goes back.
    fn boot_us(&self) -> u64;
    /// Microseconds since the Unix epoch, as the host believes.
    fn wall_us(&self) -> u64;
    /// Identity of this boot.
    fn boot_id(&self) -> [u8; 16];
}

/// The host's clocks.
#[derive(Debug, Default)]
pub struct SystemTimeSource;

impl TimeSource for SystemTimeSource {
    fn boot_us(&self) -> u64 {
        let now = rustix::time::clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
        seconds * 1_000_000 + nanoseconds / 1000
    }

    fn wall_us(&self) -> u64 {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }

    fn boot_id(&self) -> [u8; 16] {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        digits
            .parse()
            .map_or([0; 16], |id: crate::types::IncarnationId| id.0)
    }
}

/// Boot time -> time of a record, a straight line that `correct` bends.
#[derive(Debug, Clone)]
pub struct Clock {
    base_boot: u64,
    base_time: u64,
    ppm: i64,
    /// Wall minus boot at the last look.
    wall_offset: i64,
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Clock {
    /// Starts at the wall clock, but never below `floor`.
    pub fn new(boot: u64, wall: u64, floor: u64) -> Self {
        let mut clock = Self {
            base_boot: boot,
            base_time: wall.max(floor),
            ppm: 0,
            wall_offset: signed(wall) - signed(boot),
        };
        clock.correct(boot, wall);
        clock
    }

    /// Time at a moment of the boot clock. Moments before the base give the base.
    pub fn at(&self, boot: u64) -> u64 {
        let passed = boot.saturating_sub(self.base_boot);
        let rate = u64::try_from(1_000_000 + self.ppm).unwrap_or(0);
        // Split, so that no product overflows however long the base is ago.
        let whole = passed / 1_000_000 * rate;
        self.base_time + whole + passed % 1_000_000 * rate / 1_000_000
    }

    /// Compares with the wall clock. Returns a step of it in microseconds.
    pub fn correct(&mut self, boot: u64, wall: u64) -> Option<i64> {
        let ours = self.at(boot);
        self.base_boot = boot;
        self.base_time = ours;
        let offset = signed(wall) - signed(boot);
        let step = offset - self.wall_offset;
        self.wall_offset = offset;
        let behind = signed(wall) - signed(ours);
        if behind > STEP_US {
            self.base_time = wall;
            self.ppm = 0;
        } else if behind < -STEP_US {
            self.ppm = CATCH_UP_PPM;
        } else {
            self.ppm = (behind * 1_000_000 / SLEW_OVER_US).clamp(-SLEW_PPM, SLEW_PPM);
        }
        (step.abs() > STEP_US).then_some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    #[test]
    fn small_difference_is_slewed() {
        let mut clock = Clock::new(0, 1000 * S, 0);
        assert_eq!(clock.correct(S, 1001 * S + 2000), None);
        assert_eq!(clock.at(S), 1001 * S);
        assert_eq!(clock.at(11 * S), 1011 * S + 2000);
        let mut clock = Clock::new(0, 1000 * S, 0);
        assert_eq!(clock.correct(S, 1001 * S - 900_000), None);
        assert_eq!(clock.at(2 * S), 1002 * S - 500);
    }

    #[test]
    fn forward_step_is_followed_and_reported_once() {
        let mut clock = Clock::new(0, 1000 * S, 0);
        assert_eq!(clock.correct(S, 1301 * S), Some(300 * 1_000_000));
        assert_eq!(clock.at(S), 1301 * S);
        assert_eq!(clock.correct(2 * S, 1302 * S), None);
    }

    #[test]
    fn backward_step_is_reported_and_time_goes_on() {
        let mut clock = Clock::new(0, 1000 * S, 0);
        assert_eq!(clock.correct(S, 901 * S), Some(-100 * 1_000_000));
        assert_eq!(clock.at(S), 1001 * S);
        assert_eq!(clock.at(3 * S), 1002 * S);
        for second in 2..=250 {
            assert_eq!(clock.correct(second * S, (900 + second) * S), None);
        }
        let (ours, wall) = (clock.at(250 * S), 1150 * S);
        assert!(ours.abs_diff(wall) <= S, "{ours} against {wall}");
    }

    #[test]
    fn floor_above_the_wall_clock_is_kept() {
        let clock = Clock::new(5, 1000 * S, 2000 * S);
        assert_eq!(clock.at(5), 2000 * S);
        assert!(clock.at(S) > 2000 * S);
    }

    #[test]
    fn system_source_moves_on() {
        let source = SystemTimeSource;
        let (boot, wall) = (source.boot_us(), source.wall_us());
        assert!(boot > 0 && wall > 1_600_000_000 * S);
        assert!(source.boot_us() >= boot);
    }
}
