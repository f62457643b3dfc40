//! Tests of the tap as a whole, over media in memory that can lose, fill up, fail and hang.

mod basics;
mod replay;
mod rig;
