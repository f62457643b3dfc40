//! Messages on a control socket: a length (u32, little-endian), then protobuf; a descriptor may
//! travel beside a message (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use prost::Message;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Longest message: what a peer may make us allocate.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Bytes of a message with its length in front.
pub fn frame(message: &impl Message) -> io::Result<Vec<u8>> {
    let length = message.encoded_len();
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the message is too long",
        ));
    }
    let prefix = u32::try_from(length).expect("invariant: at most 1 MiB");
    let mut out = Vec::with_capacity(4 + length);
    out.extend_from_slice(&prefix.to_le_bytes());
    message.encode(&mut out).map_err(io::Error::other)?;
    Ok(out)
}

/// Sends one message and, with its first byte, a descriptor.
pub fn send(
    stream: &UnixStream,
    message: &impl Message,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = frame(message)?;
    let mut rest = bytes.as_slice();
    let mut passed = descriptor.as_slice();
    while !rest.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !passed.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(passed));
        }
        let slices = [IoSlice::new(rest)];
        match rustix::net::sendmsg(stream, &slices, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                rest = &rest[sent..];
                passed = &[];
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Receives one message, and the descriptor beside it if there is one. `None` at an orderly end.
pub fn receive<M: Message + Default>(
    stream: &UnixStream,
) -> io::Result<Option<(M, Option<OwnedFd>)>> {
    let mut prefix = [0; 4];
    let mut descriptor = None;
    if !fill(stream, &mut prefix, &mut descriptor)? {
        return Ok(None);
    }
    let length = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if length > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the message is too long",
        ));
    }
    let mut body = vec![0; length];
    if !fill(stream, &mut body, &mut descriptor)? && length > 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let message = M::decode(body.as_slice())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, descriptor)))
}

/// Fills `buffer`; false if the stream ended before its first byte.
fn fill(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptor: &mut Option<OwnedFd>,
) -> io::Result<bool> {
    let mut done = 0;
    while done < buffer.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buffer[done..])];
        let received =
            rustix::net::recvmsg(stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let bytes = match received {
            Ok(message) => message.bytes,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                *descriptor = passed.last().or(descriptor.take());
            }
        }
        match (bytes, done) {
            (0, 0) => return Ok(false),
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => done += bytes,
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::proto::{BookmarkRequest, Request, request::Verb};
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    fn request(label: &str) -> Request {
        let verb = Verb::Bookmark(BookmarkRequest {
            label: label.into(),
        });
        Request {
            id: 5,
            verb: Some(verb),
        }
    }

    #[test]
    fn a_descriptor_arrives_with_its_own_message() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"passed").unwrap();
        send(&near, &request("a"), None).unwrap();
        send(&near, &request("b"), Some(file.as_fd())).unwrap();
        drop(near);
        let (first, none) = receive::<Request>(&far).unwrap().unwrap();
        assert_eq!((first, none.is_none()), (request("a"), true));
        let (second, descriptor) = receive::<Request>(&far).unwrap().unwrap();
        assert_eq!(second, request("b"));
        let mut copy = std::fs::File::from(descriptor.expect("a descriptor"));
        copy.rewind().unwrap();
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "passed");
        assert!(receive::<Request>(&far).unwrap().is_none());
    }

    #[test]
    fn an_empty_message_is_a_message() {
        let (near, far) = UnixStream::pair().unwrap();
        send(&near, &Request::default(), None).unwrap();
        assert_eq!(
            receive::<Request>(&far).unwrap().unwrap().0,
            Request::default()
        );
    }

    #[test]
    fn truncated_oversized_and_garbled_messages_are_errors() {
        for bytes in [
            &[1, 0][..],                     // half a length
            &[10, 0, 0, 0, 1],               // half a body
            &[1, 0, 0x10, 0],                // one byte above the limit
            &[3, 0, 0, 0, 0xff, 0xff, 0xff], // not protobuf
        ] {
            let (mut near, far) = UnixStream::pair().unwrap();
            near.write_all(bytes).unwrap();
            drop(near);
            assert!(receive::<Request>(&far).is_err(), "{bytes:?}");
        }
        let long = request(&"x".repeat(MESSAGE_BYTES_MAX));
        assert!(frame(&long).is_err());
    }
}
