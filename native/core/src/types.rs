//! The numbers that must not be confused with one another, one type each.

use std::fmt;

/// A 16-byte random identity, printed as 32 hex digits.
macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidIdentity;

            /// Parses 32 hex digits.
            fn from_str(text: &str) -> Result<Self, InvalidIdentity> {
                let digits = text.as_bytes();
                if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
                    return Err(InvalidIdentity);
                }
                let mut bytes = [0u8; 16];
                for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| InvalidIdentity)?;
                    *byte = u8::from_str_radix(pair, 16).map_err(|_| InvalidIdentity)?;
                }
                Ok(Self(bytes))
            }
        }
    };
}

/// An identity that is not 32 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an identity is 32 hex digits")]
pub struct InvalidIdentity;

identity!(
    /// A consistency group.
    GroupId
);
identity!(
    /// A run of frames with one key, one numbering and one reference cache.
    IncarnationId
);

/// Position in the total order of a group's writes. The first is 1; 0 means "none".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Seq(pub u64);

/// Microseconds since the Unix epoch, strictly increasing within a group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct TimeUs(pub u64);

/// Number of a frame in its incarnation, from 0, without holes at its writer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FrameNo(pub u32);

/// Index of a 4 KiB block of a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct BlockIndex(pub u64);

/// Index of a volume within its group, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct VolumeIndex(pub u16);

/// Fencing token and branch id in one. Ordered by counter, then site.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Generation {
    pub counter: u64,
    pub site: u64,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:016x}", self.counter, self.site)
    }
}

/// A run of whole blocks of one volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Extent {
    pub volume: VolumeIndex,
    pub start: BlockIndex,
    /// Length in blocks, at least 1.
    pub blocks: u64,
}

impl Extent {
    /// The first block behind the extent.
    pub fn end(&self) -> BlockIndex {
        BlockIndex(self.start.0 + self.blocks)
    }
}
