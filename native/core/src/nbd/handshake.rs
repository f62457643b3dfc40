//! Fixed newstyle handshake over a socket, under a time limit and with every length checked.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::Export;
use super::connection::Hangup;
use super::options::{Negotiation, Step, Terms};
use super::receiver::{Receiver, send_until};
use super::wire::{self, Fields};

/// Leads one client to transmission. `stopping` is asked before each option.
pub(super) fn negotiate(
    socket: BorrowedFd<'_>,
    input: &mut Receiver,
    exports: &[Export],
    deadline: Instant,
    stopping: &dyn Fn() -> bool,
) -> Result<Terms, Hangup> {
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(&wire::SERVER_MAGIC.to_be_bytes());
    out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES).to_be_bytes());
    send_until(socket, &out, deadline)?;

    input.fill_until(socket, 4, deadline)?;
    let client_flags = Fields(input.data())
        .u32()
        .expect("invariant: four bytes are here");
    input.consume(4);
    let mut negotiation =
        Negotiation::new(exports, client_flags).ok_or(Hangup::Protocol("unknown client flags"))?;
    loop {
        input.fill_until(socket, wire::OPTION_HEADER_LEN, deadline)?;
        let (option, length) = parse_header(input.data())?;
        input.consume(wire::OPTION_HEADER_LEN);
        input.fill_until(socket, length, deadline)?;
        out.clear();
        let step = negotiation.answer(option, &input.data()[..length], stopping(), &mut out);
        input.consume(length);
        send_until(socket, &out, deadline)?;
        match step {
            Step::Continue => {}
            Step::Enter(terms) => return Ok(terms),
            Step::Close => return Err(Hangup::Closed),
        }
    }
}

fn parse_header(data: &[u8]) -> Result<(u32, usize), Hangup> {
    let mut fields = Fields(data);
    let header = (fields.u64(), fields.u32(), fields.u32());
    let (Some(wire::OPTION_MAGIC), Some(option), Some(length)) = header else {
        return Err(Hangup::Protocol("wrong magic before an option"));
    };
    let length = usize::try_from(length).map_err(|_| Hangup::Protocol("option too long"))?;
    if length > wire::OPTION_DATA_MAX {
        return Err(Hangup::Protocol("option too long"));
    }
    Ok((option, length))
}
