//! Option haggling: one option in, its replies out. Pure; `handshake` does the I/O.

use std::sync::Arc;

use super::Export;
use super::wire::{self, Fields};
use crate::constants::{BLOCK_SIZE, NBD_PAYLOAD_MAX};
use crate::device::{BlockDevice, DeviceInfo};

/// What was agreed on for the transmission phase. The size is fixed here for its whole length.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub device: Arc<dyn BlockDevice>,
    pub size: u64,
    pub read_only: bool,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// The context `base:allocation` was selected for this export.
    pub allocation: bool,
}

/// What follows an option.
#[derive(Debug)]
pub(super) enum Step {
    Continue,
    /// The replies are complete and transmission begins.
    Enter(Terms),
    /// The replies are complete and the connection ends.
    Close,
}

/// State of one client's haggling.
#[derive(Debug)]
pub(super) struct Negotiation<'a> {
    exports: &'a [Export],
    no_zeroes: bool,
    structured: bool,
    /// Index of the export that `base:allocation` was selected for.
    allocation_of: Option<usize>,
}

impl<'a> Negotiation<'a> {
    /// None: the client set a flag that nobody offered, and must be disconnected.
    pub(super) fn new(exports: &'a [Export], client_flags: u32) -> Option<Self> {
        if client_flags & !(wire::CLIENT_FIXED_NEWSTYLE | wire::CLIENT_NO_ZEROES) != 0 {
            return None;
        }
        let no_zeroes = client_flags & wire::CLIENT_NO_ZEROES != 0;
        Some(Self {
            exports,
            no_zeroes,
            structured: false,
            allocation_of: None,
        })
    }

    /// Answers one option into `out`.
    pub(super) fn answer(
        &mut self,
        option: u32,
        data: &[u8],
        stopping: bool,
        out: &mut Vec<u8>,
    ) -> Step {
        if option == wire::OPT_EXPORT_NAME {
            return if stopping {
                Step::Close
            } else {
                self.export_name(data, out)
            };
        }
        if option == wire::OPT_ABORT {
            reply(out, option, wire::REP_ACK, &[]);
            return Step::Close;
        }
        if stopping {
            refuse(
                out,
                option,
                wire::REP_ERR_SHUTDOWN,
                "the server is shutting down",
            );
            return Step::Continue;
        }
        match option {
            wire::OPT_LIST => self.list(data, out),
            wire::OPT_INFO | wire::OPT_GO => return self.info(option, data, out),
            wire::OPT_STRUCTURED_REPLY => {
                if data.is_empty() {
                    self.structured = true;
                    reply(out, option, wire::REP_ACK, &[]);
                } else {
                    refuse(
                        out,
                        option,
                        wire::REP_ERR_INVALID,
                        "this option has no data",
                    );
                }
            }
            wire::OPT_LIST_META_CONTEXT | wire::OPT_SET_META_CONTEXT => {
                self.meta_context(option, data, out);
            }
            _ => refuse(out, option, wire::REP_ERR_UNSUP, "option not supported"),
        }
        Step::Continue
    }

    /// The empty name means the only export, if there is just one.
    fn find(&self, name: &str) -> Option<usize> {
        if let Some(index) = self.exports.iter().position(|export| export.name == name) {
            return Some(index);
        }
        (name.is_empty() && self.exports.len() == 1).then_some(0)
    }

    fn terms(&self, index: usize, info: DeviceInfo) -> Terms {
        Terms {
            device: Arc::clone(&self.exports[index].device),
            size: info.size,
            read_only: info.read_only,
            structured: self.structured,
            allocation: self.structured && self.allocation_of == Some(index),
        }
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Step {
        let Some(index) = wire::string(data).and_then(|name| self.find(name)) else {
            return Step::Close;
        };
        let info = self.exports[index].device.info();
        out.extend_from_slice(&info.size.to_be_bytes());
        out.extend_from_slice(&self.transmission_flags(info).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; wire::EXPORT_NAME_ZEROES]);
        }
        Step::Enter(self.terms(index, info))
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) {
        if !data.is_empty() {
            return refuse(
                out,
                wire::OPT_LIST,
                wire::REP_ERR_INVALID,
                "this option has no data",
            );
        }
        for export in self.exports {
            let name = export.name.as_bytes();
            let mut body = Vec::with_capacity(4 + name.len() + export.description.len());
            body.extend_from_slice(&length_u32(name).to_be_bytes());
            body.extend_from_slice(name);
            body.extend_from_slice(export.description.as_bytes());
            reply(out, wire::OPT_LIST, wire::REP_SERVER, &body);
        }
        reply(out, wire::OPT_LIST, wire::REP_ACK, &[]);
    }

    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step {
        let Some((name, wanted)) = parse_info(data) else {
            refuse(out, option, wire::REP_ERR_INVALID, "malformed request");
            return Step::Continue;
        };
        let Some(index) = self.find(name) else {
            refuse(out, option, wire::REP_ERR_UNKNOWN, "no such export");
            return Step::Continue;
        };
        let export = &self.exports[index];
        let info = export.device.info();
        let mut item = |kind: u16, parts: &[&[u8]]| {
            let body = [&[&kind.to_be_bytes()[..]], parts].concat().concat();
            reply(out, option, wire::REP_INFO, &body);
        };
        let flags = self.transmission_flags(info);
        item(
            wire::INFO_EXPORT,
            &[&info.size.to_be_bytes(), &flags.to_be_bytes()],
        );
        if wanted.contains(&wire::INFO_NAME) {
            item(wire::INFO_NAME, &[export.name.as_bytes()]);
        }
        if wanted.contains(&wire::INFO_DESCRIPTION) && !export.description.is_empty() {
            item(wire::INFO_DESCRIPTION, &[export.description.as_bytes()]);
        }
        if wanted.contains(&wire::INFO_BLOCK_SIZE) {
            let sizes = BLOCK_SIZES.map(u32::to_be_bytes);
            item(wire::INFO_BLOCK_SIZE, &[&sizes[0], &sizes[1], &sizes[2]]);
        }
        reply(out, option, wire::REP_ACK, &[]);
        if option == wire::OPT_GO {
            Step::Enter(self.terms(index, info))
        } else {
            Step::Continue
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let select = option == wire::OPT_SET_META_CONTEXT;
        if select {
            // Also a failing request replaces what was selected before.
            self.allocation_of = None;
        }
        if !self.structured {
            return refuse(
                out,
                option,
                wire::REP_ERR_INVALID,
                "needs structured replies",
            );
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            return refuse(out, option, wire::REP_ERR_INVALID, "malformed request");
        };
        let Some(index) = self.find(name) else {
            return refuse(out, option, wire::REP_ERR_UNKNOWN, "no such export");
        };
        let matches = queries
            .iter()
            .any(|query| *query == wire::ALLOCATION_CONTEXT || (!select && *query == "base:"));
        if matches || (!select && queries.is_empty()) {
            let id = if select {
                wire::ALLOCATION_CONTEXT_ID
            } else {
                0
            };
            let body = [&id.to_be_bytes()[..], wire::ALLOCATION_CONTEXT.as_bytes()].concat();
            reply(out, option, wire::REP_META_CONTEXT, &body);
            if select {
                self.allocation_of = Some(index);
            }
        }
        reply(out, option, wire::REP_ACK, &[]);
    }

    fn transmission_flags(&self, info: DeviceInfo) -> u16 {
        let mut flags = wire::EXPORT_HAS_FLAGS | wire::EXPORT_SEND_FLUSH | wire::EXPORT_SEND_FUA;
        if info.read_only {
            flags |= wire::EXPORT_READ_ONLY;
        } else {
            flags |= wire::EXPORT_SEND_TRIM | wire::EXPORT_SEND_WRITE_ZEROES;
        }
        if info.multi_conn {
            flags |= wire::EXPORT_CAN_MULTI_CONN;
        }
        if self.structured {
            flags |= wire::EXPORT_SEND_DF;
        }
        flags
    }
}

/// Minimum, preferred and largest request: any byte, a block of history, the payload limit.
const BLOCK_SIZES: [u32; 3] = [1, 4096, 32 << 20];
const _: () = assert!(BLOCK_SIZES[1] as usize == BLOCK_SIZE);
const _: () = assert!(BLOCK_SIZES[2] as usize == NBD_PAYLOAD_MAX);

fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let wanted = (0..count)
        .map(|_| fields.u16())
        .collect::<Option<Vec<u16>>>()?;
    fields.is_empty().then_some((name, wanted))
}

fn parse_meta_context(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.is_empty().then_some((name, queries))
}

fn length_u32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("invariant: option replies are far below 4 GiB")
}

fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    reply(out, option, kind, message.as_bytes());
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, body: &[u8]) {
    out.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&length_u32(body).to_be_bytes());
    out.extend_from_slice(body);
}
