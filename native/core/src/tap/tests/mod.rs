//! Tests of the tap as a whole, over media in memory that can lose, fill up, fail and hang.
//! Numbers of these tests fit in any integer type.
#![allow(clippy::cast_possible_truncation)]

mod basics;
mod crash;
mod gaps;
mod order;
mod replay;
mod rig;
mod starting;
mod unreadable;
