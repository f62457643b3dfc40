//! Requests: what is wrong with them, and how they run on the device.

use super::options::Terms;
use super::reply::Replies;
use super::wire::{self, Errno, RequestHeader};
use crate::constants::NBD_PAYLOAD_MAX;
use crate::device::{DeviceError, RequestFlags};

/// Descriptors of one block status reply; a client asks on where they end.
const EXTENTS_MAX: usize = 4096;

/// A request that may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub command: Command,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
    pub fua: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes { no_hole: bool },
    BlockStatus { one: bool },
}

/// The request would have to wait; it has done nothing and left no reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WouldBlock;

/// Judges a request; an error is its reply.
pub(super) fn check(header: &RequestHeader, terms: &Terms) -> Result<Request, Errno> {
    let flag = |flag: u16| header.flags & flag != 0;
    let (command, flags_known) = match header.command {
        wire::CMD_READ => (
            Command::Read,
            if terms.structured {
                wire::CMD_FLAG_DF
            } else {
                0
            },
        ),
        wire::CMD_WRITE => (Command::Write, 0),
        // The connection ends whatever its fields say.
        wire::CMD_DISC => (Command::Disconnect, u16::MAX),
        wire::CMD_FLUSH => (Command::Flush, 0),
        wire::CMD_TRIM => (Command::Trim, 0),
        wire::CMD_WRITE_ZEROES => {
            let no_hole = flag(wire::CMD_FLAG_NO_HOLE);
            (Command::WriteZeroes { no_hole }, wire::CMD_FLAG_NO_HOLE)
        }
        wire::CMD_BLOCK_STATUS => {
            let one = flag(wire::CMD_FLAG_REQ_ONE);
            (Command::BlockStatus { one }, wire::CMD_FLAG_REQ_ONE)
        }
        _ => return Err(Errno::Inval),
    };
    // FUA was offered, so it must be accepted with every command.
    if header.flags & !(flags_known | wire::CMD_FLAG_FUA) != 0 {
        return Err(Errno::Inval);
    }
    let writes = matches!(
        command,
        Command::Write | Command::Trim | Command::WriteZeroes { .. }
    );
    if writes && terms.read_only {
        return Err(Errno::Perm);
    }
    let inside = header
        .offset
        .checked_add(u64::from(header.length))
        .is_some_and(|end| end <= terms.size);
    match command {
        Command::Disconnect => {}
        Command::Flush if header.offset != 0 || header.length != 0 => return Err(Errno::Inval),
        Command::Write | Command::WriteZeroes { .. } if !inside => return Err(Errno::NoSpc),
        Command::Read if header.length as usize > NBD_PAYLOAD_MAX => {
            return Err(if terms.structured {
                Errno::Overflow
            } else {
                Errno::Inval
            });
        }
        Command::BlockStatus { .. } if !terms.allocation || header.length == 0 => {
            return Err(Errno::Inval);
        }
        _ if !inside => return Err(Errno::Inval),
        _ => {}
    }
    Ok(Request {
        command,
        cookie: header.cookie,
        offset: header.offset,
        length: header.length,
        fua: flag(wire::CMD_FLAG_FUA),
    })
}

/// Most bytes that the reply can have.
pub(super) fn reply_len_max(request: &Request, terms: &Terms) -> usize {
    let success = match request.command {
        Command::Read => Replies::read_len(terms.structured, request.length),
        Command::BlockStatus { .. } => wire::CHUNK_HEADER_LEN + 4 + 8 * EXTENTS_MAX,
        _ => wire::SIMPLE_REPLY_LEN,
    };
    success.max(Replies::ERROR_LEN_MAX)
}

/// Runs a request and lays out its reply, for which `out` has room.
pub(super) fn execute(
    request: &Request,
    payload: &[u8],
    terms: &Terms,
    nowait: bool,
    out: &mut Replies,
) -> Result<(), WouldBlock> {
    let Request {
        cookie,
        offset,
        length,
        ..
    } = *request;
    let device = &*terms.device;
    let mut flags = RequestFlags {
        fua: request.fua,
        nowait,
        no_hole: false,
    };
    let (result, writes) = match request.command {
        Command::Read => {
            let fill = |buffer: &mut [u8]| match buffer {
                [] => Ok(()),
                _ => device.read(buffer, offset, flags),
            };
            match out.read(terms.structured, cookie, offset, length, fill) {
                Ok(()) => return Ok(()),
                Err(error) => (Err(error), false),
            }
        }
        Command::BlockStatus { one } => {
            // The device's answer has no way to decline waiting.
            if nowait {
                return Err(WouldBlock);
            }
            match allocation(request, one, terms) {
                Ok(extents) => {
                    out.block_status(cookie, &extents);
                    return Ok(());
                }
                Err(error) => (Err(error), false),
            }
        }
        // Nothing to do, which the device need not hear of.
        Command::Write | Command::WriteZeroes { .. } | Command::Trim if length == 0 => {
            (Ok(()), true)
        }
        Command::Write => (device.write(payload, offset, flags), true),
        Command::Flush => (device.flush(flags), true),
        Command::Trim => (device.trim(offset, u64::from(length), flags), false),
        Command::WriteZeroes { no_hole } => {
            flags.no_hole = no_hole;
            (device.zero(offset, u64::from(length), flags), true)
        }
        Command::Disconnect => (Ok(()), false),
    };
    match result {
        Ok(()) => out.done(cookie),
        Err(DeviceError::WouldBlock) if nowait => return Err(WouldBlock),
        Err(error) => out.error(terms.structured, cookie, Errno::from_device(error, writes)),
    }
    Ok(())
}

/// Descriptors from the request's offset on, equal neighbours merged; at least one.
fn allocation(request: &Request, one: bool, terms: &Terms) -> Result<Vec<(u32, u32)>, DeviceError> {
    let limit = if one { 1 } else { EXTENTS_MAX };
    let mut extents: Vec<(u32, u32)> = Vec::new();
    let mut left = request.length;
    let mut each = |run: crate::device::Allocation| {
        let length = u32::try_from(run.length).unwrap_or(u32::MAX).min(left);
        if length == 0 {
            return true;
        }
        let hole = if run.hole { wire::STATE_HOLE } else { 0 };
        let state = hole | if run.zero { wire::STATE_ZERO } else { 0 };
        let full = extents.len() == limit;
        match extents.last_mut() {
            Some(last) if last.1 == state => last.0 += length,
            _ if full => return false,
            _ => extents.push((length, state)),
        }
        left -= length;
        left > 0
    };
    terms
        .device
        .allocation(request.offset, u64::from(request.length), &mut each)?;
    // A device that says nothing breaks its contract; "allocated" is always a safe answer.
    if extents.is_empty() {
        extents.push((request.length, 0));
    }
    Ok(extents)
}
