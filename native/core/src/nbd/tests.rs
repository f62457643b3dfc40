//! What clients may ask, and what hostile ones may try.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::testing::{Client, MemoryDevice, Reply, request, text, write_request};
use super::wire;
use super::{Export, Limits, Server};
use crate::device::{DeviceError, RequestFlags};

const SIZE: u64 = 8 << 20;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ESHUTDOWN: u32 = 108;

struct Fixture {
    server: Server,
    path: PathBuf,
    device: Arc<MemoryDevice>,
    _directory: tempfile::TempDir,
}

fn export(name: &str, device: &Arc<MemoryDevice>) -> Export {
    let device = Arc::clone(device);
    Export {
        name: name.into(),
        description: format!("volume {name}"),
        device,
    }
}

fn serve(device: MemoryDevice, limits: Limits) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let device = Arc::new(device);
    let server = Server::with_limits(vec![export("vol", &device)], limits);
    server.listen_unix(&path).unwrap();
    Fixture {
        server,
        path,
        device,
        _directory: directory,
    }
}

fn fixture() -> Fixture {
    serve(MemoryDevice::new(SIZE), Limits::default())
}

/// Everything declines `nowait`, so all goes through the pool.
fn waiting_fixture(size: u64, pool_threads: usize) -> Fixture {
    let device = MemoryDevice {
        waits: true,
        ..MemoryDevice::new(size)
    };
    serve(
        device,
        Limits {
            pool_threads,
            ..Limits::default()
        },
    )
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a reply is there, or comes before the server closes.
fn more(stream: &UnixStream) -> bool {
    let mut byte = [0];
    let flags = rustix::net::RecvFlags::PEEK;
    matches!(rustix::net::recv(stream, &mut byte[..], flags), Ok((_, 1)))
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|at| u8::try_from(at % 251).unwrap() ^ seed)
        .collect()
}

#[test]
fn test_written_data_reads_back_in_both_reply_styles() {
    let fixture = fixture();
    for structured in [false, true] {
        let mut client = Client::connect(&fixture.path, "vol", structured);
        assert_eq!(client.size, SIZE);
        let data = pattern(5000, u8::from(structured));
        assert_eq!(client.write(1234, &data), Reply::Simple(0));
        let offset = if structured { 1234 } else { 0 };
        assert_eq!(
            client.call(wire::CMD_READ, 0, 1234, 5000),
            Reply::Data(offset, data)
        );
    }
}

#[test]
fn test_transmission_flags_say_what_is_served() {
    let plain = fixture();
    assert_eq!(
        Client::connect(&plain.path, "vol", false).flags,
        0b1_0110_1101
    );
    assert_eq!(
        Client::connect(&plain.path, "vol", true).flags,
        0b1_1110_1101
    );
    let mut device = MemoryDevice::new(SIZE);
    device.info.read_only = true;
    device.info.multi_conn = false;
    let frozen = serve(device, Limits::default());
    assert_eq!(Client::connect(&frozen.path, "vol", false).flags, 0b1111);
}

#[test]
fn test_old_clients_enter_by_export_name() {
    let fixture = fixture();
    for (flags, zeroes) in [(1, 124), (3, 0), (0, 124)] {
        let mut client = Client::greet(&fixture.path, flags);
        client.send_option(wire::OPT_EXPORT_NAME, b"vol");
        assert_eq!(client.take(), SIZE.to_be_bytes());
        assert_eq!(client.take::<2>(), [1, 0b0110_1101]);
        assert_eq!(client.take_vec(zeroes), vec![0; zeroes]);
        assert_eq!(client.write(0, b"old"), Reply::Simple(0));
    }
    let mut client = Client::greet(&fixture.path, 3);
    client.send_option(wire::OPT_EXPORT_NAME, b"unknown");
    client.assert_closed();
}

#[test]
fn test_options_are_answered_as_the_protocol_says() {
    let fixture = fixture();
    let mut client = Client::greet(&fixture.path, 3);
    let listed = client.ask(wire::OPT_LIST, &[], wire::REP_ACK);
    assert_eq!(
        listed,
        [(
            wire::REP_SERVER,
            [text("vol"), b"volume vol".to_vec()].concat()
        )]
    );
    client.ask(wire::OPT_LIST, b"x", wire::REP_ERR_INVALID);
    // PEEK_EXPORT, STARTTLS, EXTENDED_HEADERS and one that nobody knows
    for option in [4, 5, 11, 4711] {
        client.ask(option, b"whatever", wire::REP_ERR_UNSUP);
    }
    let all = [text("vol"), vec![0, 4, 0, 0, 0, 1, 0, 2, 0, 3]].concat();
    let infos = client.ask(wire::OPT_INFO, &all, wire::REP_ACK);
    let kinds: Vec<u8> = infos.iter().map(|(_, body)| body[1]).collect();
    assert_eq!(kinds, [0, 1, 2, 3]);
    assert_eq!(infos[1].1[2..], *b"vol");
    assert_eq!(infos[3].1[2..], [0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    client.ask(
        wire::OPT_INFO,
        &[text("nil"), vec![0, 0]].concat(),
        wire::REP_ERR_UNKNOWN,
    );
    client.ask(wire::OPT_STRUCTURED_REPLY, b"x", wire::REP_ERR_INVALID);
    client.ask(wire::OPT_ABORT, &[], wire::REP_ACK);
    client.assert_closed();
}

#[test]
fn test_the_empty_name_is_the_only_export() {
    let fixture = fixture();
    assert_eq!(Client::connect(&fixture.path, "", true).size, SIZE);

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("two.sock");
    let server = Server::new(vec![
        export("a", &fixture.device),
        export("b", &Arc::new(MemoryDevice::new(4096))),
    ]);
    server.listen_unix(&path).unwrap();
    let mut client = Client::greet(&path, 3);
    client.ask(
        wire::OPT_GO,
        &[text(""), vec![0, 0]].concat(),
        wire::REP_ERR_UNKNOWN,
    );
    assert_eq!(Client::connect(&path, "b", true).size, 4096);
}

#[test]
fn test_malformed_options_are_refused_and_the_next_one_is_served() {
    let fixture = fixture();
    let mut client = Client::greet(&fixture.path, 3);
    client.ask(wire::OPT_STRUCTURED_REPLY, &[], wire::REP_ACK);
    let too_long = "x".repeat(wire::STRING_MAX + 1);
    let info_cases = [
        vec![],
        vec![0, 0, 0, 9, b'v'],
        vec![255, 255, 255, 255, b'v', 0, 0],
        [text("vol"), vec![0, 2, 0, 0]].concat(),
        [text("vol"), vec![0, 0, 9]].concat(),
        [text("v\0l"), vec![0, 0]].concat(),
        [vec![0, 0, 0, 1, 0xff], vec![0, 0]].concat(),
        [text(&too_long), vec![0, 0]].concat(),
    ];
    for data in info_cases {
        client.ask(wire::OPT_GO, &data, wire::REP_ERR_INVALID);
    }
    let context_cases = [
        text("vol"),
        [text("vol"), vec![0, 0, 0, 2], text("base:")].concat(),
        [text("vol"), vec![255, 255, 255, 255]].concat(),
        [text("vol"), vec![0, 0, 0, 1], vec![0, 0, 1, 0]].concat(),
    ];
    for data in context_cases {
        client.ask(wire::OPT_SET_META_CONTEXT, &data, wire::REP_ERR_INVALID);
    }
    client.ask(
        wire::OPT_GO,
        &[text("vol"), vec![0, 0]].concat(),
        wire::REP_ACK,
    );
    assert_eq!(
        client.call(wire::CMD_READ, 0, 0, 1),
        Reply::Data(0, vec![0])
    );
}

#[test]
fn test_meta_contexts_are_listed_and_selected() {
    let fixture = fixture();
    let mut client = Client::greet(&fixture.path, 3);
    let query = |queries: &[&str]| {
        let count = u32::try_from(queries.len()).unwrap().to_be_bytes().to_vec();
        [
            vec![text("vol"), count],
            queries.iter().map(|query| text(query)).collect(),
        ]
        .concat()
        .concat()
    };
    let allocation = query(&["base:allocation"]);
    client.ask(
        wire::OPT_SET_META_CONTEXT,
        &allocation,
        wire::REP_ERR_INVALID,
    );
    client.ask(wire::OPT_STRUCTURED_REPLY, &[], wire::REP_ACK);
    let reply = |id: u8| {
        let body = [&[0, 0, 0, id][..], b"base:allocation"].concat();
        vec![(wire::REP_META_CONTEXT, body)]
    };
    for queries in [
        &[][..],
        &["base:"],
        &["qemu:dirty-bitmap:x", "base:allocation"],
    ] {
        let listed = client.ask(wire::OPT_LIST_META_CONTEXT, &query(queries), wire::REP_ACK);
        assert_eq!(listed, reply(0));
    }
    for queries in [&["qemu:allocation-depth"][..], &["base:other"]] {
        assert_eq!(
            client.ask(wire::OPT_LIST_META_CONTEXT, &query(queries), wire::REP_ACK),
            []
        );
    }
    assert_eq!(
        client.ask(
            wire::OPT_SET_META_CONTEXT,
            &query(&["base:"]),
            wire::REP_ACK
        ),
        []
    );
    assert_eq!(
        client.ask(wire::OPT_SET_META_CONTEXT, &allocation, wire::REP_ACK),
        reply(1)
    );
    // A failed selection takes the former one away.
    client.ask(wire::OPT_SET_META_CONTEXT, b"", wire::REP_ERR_INVALID);
    client.ask(
        wire::OPT_GO,
        &[text("vol"), vec![0, 0]].concat(),
        wire::REP_ACK,
    );
    assert_eq!(
        client.call(wire::CMD_BLOCK_STATUS, 0, 0, 4096),
        Reply::Error(EINVAL)
    );
}

#[test]
fn test_block_status_merges_runs_and_honours_req_one() {
    let fixture = fixture();
    let mut client = Client::connect(&fixture.path, "vol", true);
    let half = u32::try_from(SIZE / 2).unwrap();
    let all = client.call(wire::CMD_BLOCK_STATUS, 0, 0, 2 * half);
    assert_eq!(all, Reply::Status(vec![(half, 0), (half, 3)]));
    let one = client.call(
        wire::CMD_BLOCK_STATUS,
        wire::CMD_FLAG_REQ_ONE,
        100,
        2 * half - 100,
    );
    assert_eq!(one, Reply::Status(vec![(half - 100, 0)]));
    let short = client.call(
        wire::CMD_BLOCK_STATUS,
        wire::CMD_FLAG_REQ_ONE,
        SIZE - 10,
        10,
    );
    assert_eq!(short, Reply::Status(vec![(10, 3)]));
    for (offset, length) in [(0, 0), (SIZE, 1), (SIZE - 1, 2), (u64::MAX, 4096)] {
        let reply = client.call(wire::CMD_BLOCK_STATUS, 0, offset, length);
        assert_eq!(reply, Reply::Error(EINVAL));
    }
}

#[test]
fn test_wrong_requests_get_the_errors_of_the_protocol() {
    let fixture = fixture();
    for structured in [false, true] {
        let error = |number| {
            if structured {
                Reply::Error(number)
            } else {
                Reply::Simple(number)
            }
        };
        let mut client = Client::connect(&fixture.path, "vol", structured);
        let whole = 32 << 20;
        let too_long = if structured { EOVERFLOW } else { EINVAL };
        let cases = [
            (wire::CMD_READ, 0, SIZE - 1, 2, EINVAL),
            (wire::CMD_READ, 0, u64::MAX, 2, EINVAL),
            (wire::CMD_READ, 0, 0, whole + 1, too_long),
            (wire::CMD_READ, 0, 0, u32::MAX, too_long),
            (wire::CMD_READ, wire::CMD_FLAG_NO_HOLE, 0, 4096, EINVAL),
            (wire::CMD_TRIM, 0, SIZE, 1, EINVAL),
            (wire::CMD_TRIM, wire::CMD_FLAG_NO_HOLE, 0, 1, EINVAL),
            (wire::CMD_WRITE_ZEROES, 0, SIZE - 1, 2, ENOSPC),
            (wire::CMD_WRITE_ZEROES, 1 << 4, 0, 2, EINVAL),
            (wire::CMD_FLUSH, 0, 0, 1, EINVAL),
            (wire::CMD_FLUSH, 0, 1, 0, EINVAL),
            (5, 0, 0, 4096, EINVAL),
            (8, 0, 0, 0, EINVAL),
            (0xffff, 0xffff, u64::MAX, u32::MAX, EINVAL),
        ];
        for (command, flags, offset, length, number) in cases {
            let reply = client.call(command, flags, offset, length);
            assert_eq!(reply, error(number), "{command} {flags} {offset} {length}");
        }
        if !structured {
            let reply = client.call(wire::CMD_READ, wire::CMD_FLAG_DF, 0, 4096);
            assert_eq!(reply, Reply::Simple(EINVAL));
        }
        // A refused write's payload is skipped, small or large.
        for length in [10, 300 * 1024] {
            assert_eq!(client.write(SIZE - 1, &vec![1; length]), error(ENOSPC));
            assert_eq!(client.write(u64::MAX, &vec![1; length]), error(ENOSPC));
        }
        client.send(&request(wire::CMD_WRITE, wire::CMD_FLAG_DF, 5, 0, 3));
        client.send(b"abc");
        assert_eq!(client.reply(None), (5, error(EINVAL)));
        assert_eq!(client.call(wire::CMD_FLUSH, 0, 0, 0), Reply::Simple(0));
    }
    assert!(fixture.device.content.lock().iter().all(|byte| *byte == 0));
}

#[test]
fn test_requests_of_no_length_are_harmless() {
    let fixture = fixture();
    let mut client = Client::connect(&fixture.path, "vol", true);
    for offset in [0, SIZE] {
        assert_eq!(client.call(wire::CMD_READ, 0, offset, 0), Reply::None);
        assert_eq!(client.write(offset, &[]), Reply::Simple(0));
        assert_eq!(client.call(wire::CMD_TRIM, 0, offset, 0), Reply::Simple(0));
        assert_eq!(
            client.call(wire::CMD_WRITE_ZEROES, 0, offset, 0),
            Reply::Simple(0)
        );
    }
    assert_eq!(*fixture.device.log.lock(), []);
    let mut plain = Client::connect(&fixture.path, "vol", false);
    assert_eq!(plain.call(wire::CMD_READ, 0, 0, 0), Reply::Data(0, vec![]));
}

#[test]
fn test_a_read_only_export_refuses_writes() {
    let mut device = MemoryDevice::new(SIZE);
    device.info.read_only = true;
    let fixture = serve(device, Limits::default());
    let mut client = Client::connect(&fixture.path, "vol", true);
    assert_eq!(client.write(0, b"no"), Reply::Error(EPERM));
    assert_eq!(client.call(wire::CMD_TRIM, 0, 0, 4096), Reply::Error(EPERM));
    assert_eq!(
        client.call(wire::CMD_WRITE_ZEROES, 0, 0, 4096),
        Reply::Error(EPERM)
    );
    assert_eq!(
        client.call(wire::CMD_READ, 0, 0, 1),
        Reply::Data(0, vec![0])
    );
    assert_eq!(client.call(wire::CMD_FLUSH, 0, 0, 0), Reply::Simple(0));
}

#[test]
fn test_flags_reach_the_device() {
    let fixture = fixture();
    let mut client = Client::connect(&fixture.path, "vol", true);
    client.send(&request(wire::CMD_WRITE, wire::CMD_FLAG_FUA, 1, 0, 1));
    client.send(b"x");
    assert_eq!(client.reply(None), (1, Reply::Simple(0)));
    client.call(wire::CMD_TRIM, wire::CMD_FLAG_FUA, 0, 4096);
    client.call(wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_NO_HOLE, 0, 4096);
    client.call(wire::CMD_WRITE_ZEROES, 0, 0, 4096);
    let flags = |fua, no_hole| RequestFlags {
        fua,
        no_hole,
        nowait: true,
    };
    let expected = [
        ("write", flags(true, false)),
        ("trim", flags(true, false)),
        ("zero", flags(false, true)),
        ("zero", flags(false, false)),
    ];
    assert_eq!(*fixture.device.log.lock(), expected);
}

#[test]
fn test_device_errors_become_protocol_errors() {
    let cases = [
        (DeviceError::ReadOnly, EPERM, EPERM),
        (DeviceError::OutOfRange, ENOSPC, EINVAL),
        (DeviceError::NoSpace, ENOSPC, ENOSPC),
        (DeviceError::Shutdown, ESHUTDOWN, ESHUTDOWN),
        (DeviceError::Io(libc::EDQUOT), ENOSPC, ENOSPC),
        (DeviceError::Io(libc::EUCLEAN), EIO, EIO),
        // Against the contract, but no reason to fall over.
        (DeviceError::WouldBlock, EIO, EIO),
    ];
    for fixture in [fixture(), waiting_fixture(SIZE, 2)] {
        let mut client = Client::connect(&fixture.path, "vol", true);
        for (failure, write, read) in cases {
            *fixture.device.failure.lock() = Some(failure);
            assert_eq!(client.write(0, b"x"), Reply::Error(write));
            assert_eq!(client.write(0, &vec![0; 1 << 20]), Reply::Error(write));
            assert_eq!(client.call(wire::CMD_READ, 0, 0, 1), Reply::Error(read));
            assert_eq!(
                client.call(wire::CMD_READ, 0, 0, 1 << 20),
                Reply::Error(read)
            );
        }
    }
}

/// A mixed script, and the content that it leaves.
fn script() -> (Vec<u8>, Vec<u8>, Vec<(u64, usize)>) {
    let mut bytes = Vec::new();
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    let mut reads = Vec::new();
    for index in 0..60u64 {
        let length =
            [1, 511, 4096, 70_000, 200_000, 300_000, 1 << 20][usize::try_from(index % 7).unwrap()];
        let offset = index * 97_001;
        let start = usize::try_from(offset).unwrap();
        let data = pattern(length, u8::try_from(index).unwrap());
        bytes.extend(write_request(index, offset, &data));
        model[start..start + length].copy_from_slice(&data);
        let read = u32::try_from(length).unwrap();
        bytes.extend(request(wire::CMD_READ, 0, 1000 + index, offset, read));
        reads.push((1000 + index, length));
    }
    (bytes, model, reads)
}

#[test]
fn test_requests_may_arrive_in_any_pieces() {
    for step in [7, 4096, 65_537, usize::MAX] {
        let fixture = fixture();
        let mut client = Client::connect(&fixture.path, "vol", true);
        let (bytes, model, reads) = script();
        let mut sender = client.stream.try_clone().unwrap();
        // A tiny step for the whole of it would take long; it is the headers that matter.
        let bytes_end = if step == 7 { 400_000 } else { bytes.len() };
        let sending = std::thread::spawn(move || {
            for piece in bytes[..bytes_end].chunks(step) {
                sender.write_all(piece).unwrap();
            }
            sender.write_all(&bytes[bytes_end..]).unwrap();
        });
        for (expected, length) in reads {
            assert_eq!(client.reply(None), (expected - 1000, Reply::Simple(0)));
            let (cookie, Reply::Data(_, data)) = client.reply(None) else {
                panic!("no data");
            };
            assert_eq!((cookie, data.len()), (expected, length));
            assert_eq!(data, pattern(length, u8::try_from(cookie - 1000).unwrap()));
        }
        sending.join().unwrap();
        assert!(*fixture.device.content.lock() == model);
    }
}

#[test]
fn test_what_would_wait_is_answered_by_the_pool() {
    let fixture = waiting_fixture(SIZE, 4);
    let mut client = Client::connect(&fixture.path, "vol", true);
    // Far more than may be deferred, with payloads that exceed that limit as well.
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        for index in 0..500u64 {
            let length = if index % 10 == 0 { 700_000 } else { 4096 };
            let data = vec![u8::try_from(index % 256).unwrap(); length];
            sender
                .write_all(&write_request(index, (index % 10) * 800_000, &data))
                .unwrap();
        }
        sender
            .write_all(&request(wire::CMD_FLUSH, 0, 500, 0, 0))
            .unwrap();
    });
    let mut cookies: Vec<u64> = (0..501)
        .map(|_| {
            let (cookie, reply) = client.reply(None);
            assert_eq!(reply, Reply::Simple(0));
            cookie
        })
        .collect();
    sending.join().unwrap();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..501));
    let data = pattern(3 << 20, 9);
    assert_eq!(client.write(1, &data), Reply::Simple(0));
    let length = u32::try_from(data.len()).unwrap();
    assert_eq!(
        client.call(wire::CMD_READ, 0, 1, length),
        Reply::Data(1, data)
    );
    let log = fixture.device.log.lock();
    assert!(log.iter().all(|(_, flags)| !flags.nowait));
}

#[test]
fn test_a_slow_request_does_not_hold_up_those_behind_it() {
    let fixture = fixture();
    let mut client = Client::connect(&fixture.path, "vol", true);
    fixture.device.hold(true);
    // Block status always goes to the pool.
    client.send(&request(wire::CMD_BLOCK_STATUS, 0, 1, 0, 4096));
    assert_eq!(client.write(0, b"fast"), Reply::Simple(0));
    fixture.device.hold(false);
    assert_eq!(client.reply(None), (1, Reply::Status(vec![(4096, 0)])));
}

#[test]
fn test_a_client_that_does_not_read_holds_up_nobody_else() {
    let fixture = waiting_fixture(64 << 20, 2);
    let mut deaf = Client::connect(&fixture.path, "vol", true);
    for cookie in 0..4 {
        deaf.send(&request(wire::CMD_READ, 0, cookie, 0, 8 << 20));
    }
    let mut other = Client::connect(&fixture.path, "vol", true);
    for _ in 0..20 {
        assert_eq!(other.call(wire::CMD_READ, 0, 0, 1), Reply::Data(0, vec![0]));
    }
    let mut cookies: Vec<u64> = (0..4)
        .map(|_| {
            let (cookie, reply) = deaf.reply(None);
            assert_eq!(reply, Reply::Data(0, vec![0; 8 << 20]));
            cookie
        })
        .collect();
    cookies.sort_unstable();
    assert_eq!(cookies, [0, 1, 2, 3]);
}

#[test]
fn test_the_largest_payload_passes_and_a_longer_one_disconnects() {
    let fixture = serve(MemoryDevice::new(40 << 20), Limits::default());
    let mut client = Client::connect(&fixture.path, "vol", false);
    let data = pattern(32 << 20, 3);
    assert_eq!(client.write(5, &data), Reply::Simple(0));
    assert_eq!(
        client.call(wire::CMD_READ, 0, 5, 32 << 20),
        Reply::Data(0, data)
    );
    client.send(&request(wire::CMD_WRITE, 0, 1, 0, (32 << 20) + 1));
    client.assert_closed();
}

#[test]
fn test_broken_clients_are_disconnected() {
    let fixture = fixture();
    let mut client = Client::connect(&fixture.path, "vol", true);
    client.send(&[0x55; 28]);
    client.assert_closed();

    for flags in [4, 1 << 31] {
        Client::greet(&fixture.path, flags).assert_closed();
    }
    let mut client = Client::greet(&fixture.path, 3);
    client.send(&[0x55; 16]);
    client.assert_closed();

    let mut client = Client::greet(&fixture.path, 3);
    let header = [
        &wire::OPTION_MAGIC.to_be_bytes()[..],
        &[0, 0, 0, 7],
        &[255; 4],
    ]
    .concat();
    client.send(&header);
    client.assert_closed();
    eventually("all gone", || fixture.server.clients() == 0);
}

#[test]
fn test_a_client_that_goes_in_the_middle_of_a_write_changes_nothing() {
    let fixture = fixture();
    for length in [4096, 1 << 20] {
        let mut client = Client::connect(&fixture.path, "vol", true);
        client.send(&request(wire::CMD_WRITE, 0, 1, 0, length));
        client.send(&[0xee; 4095]);
    }
    eventually("both gone", || fixture.server.clients() == 0);
    assert_eq!(*fixture.device.log.lock(), []);
}

#[test]
fn test_replies_reach_a_client_that_closed_its_sending_side() {
    let fixture = waiting_fixture(SIZE, 2);
    let mut client = Client::connect(&fixture.path, "vol", true);
    fixture.device.hold(true);
    for cookie in 0..3 {
        client.send(&request(wire::CMD_READ, 0, cookie, 0, 2 << 20));
    }
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    fixture.device.hold(false);
    for _ in 0..3 {
        assert_eq!(client.reply(None).1, Reply::Data(0, vec![0; 2 << 20]));
    }
    client.assert_closed();
}

#[test]
fn test_disconnect_finishes_what_was_begun() {
    let fixture = waiting_fixture(SIZE, 2);
    let mut client = Client::connect(&fixture.path, "vol", true);
    let mut bytes = Vec::new();
    for cookie in 0..30 {
        bytes.extend(write_request(cookie, cookie * 4096, &[1; 4096]));
    }
    bytes.extend(request(wire::CMD_DISC, 0, 0, 0, 0));
    client.send(&bytes);
    for _ in 0..30 {
        assert_eq!(client.reply(None).1, Reply::Simple(0));
    }
    client.assert_closed();
    assert_eq!(
        fixture.device.content.lock()[..30 * 4096],
        vec![1; 30 * 4096]
    );
}

#[test]
fn test_a_client_that_says_nothing_is_disconnected_in_time() {
    let limits = Limits {
        handshake: Duration::from_millis(300),
        ..Limits::default()
    };
    let fixture = serve(MemoryDevice::new(SIZE), limits);
    let begun = Instant::now();
    let mut silent = Client::greet(&fixture.path, 3);
    let mut slow = Client::greet(&fixture.path, 3);
    // A byte now and then does not buy more time.
    for byte in wire::OPTION_MAGIC.to_be_bytes() {
        std::thread::sleep(Duration::from_millis(60));
        if slow.stream.write_all(&[byte]).is_err() {
            break;
        }
    }
    slow.assert_closed();
    silent.assert_closed();
    assert!(begun.elapsed() < Duration::from_secs(5));
    // Once in transmission, a client may be idle.
    let mut idle = Client::connect(&fixture.path, "vol", true);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(idle.write(0, b"still here"), Reply::Simple(0));
}

#[test]
fn test_clients_beyond_the_limit_are_turned_away() {
    let fixture = serve(
        MemoryDevice::new(SIZE),
        Limits {
            connections: 2,
            ..Limits::default()
        },
    );
    let mut first = Client::connect(&fixture.path, "vol", true);
    let second = Client::connect(&fixture.path, "vol", true);
    assert_eq!(fixture.server.clients(), 2);
    let third = UnixStream::connect(&fixture.path).unwrap();
    Client {
        stream: third,
        size: 0,
        flags: 0,
    }
    .assert_closed();
    drop(second);
    eventually("room again", || fixture.server.clients() == 1);
    assert_eq!(Client::connect(&fixture.path, "vol", true).size, SIZE);
    assert_eq!(first.write(0, b"x"), Reply::Simple(0));
}

#[test]
fn test_stop_lets_running_requests_finish() {
    let fixture = waiting_fixture(SIZE, 2);
    let mut client = Client::connect(&fixture.path, "vol", true);
    fixture.device.hold(true);
    client.send(&write_request(1, 0, b"kept"));
    eventually("the request runs", || {
        fixture.device.waiting.load(Ordering::SeqCst) == 1
    });
    let server = Arc::new(fixture.server);
    let stopping = std::thread::spawn({
        let server = Arc::clone(&server);
        move || server.stop()
    });
    eventually("stop listens no more", || {
        UnixStream::connect(&fixture.path).is_err()
    });
    assert!(!fixture.path.exists());
    fixture.device.hold(false);
    assert_eq!(client.reply(None), (1, Reply::Simple(0)));
    assert_eq!(fixture.device.content.lock()[..4], *b"kept");
    client.assert_closed();
    stopping.join().unwrap();
    assert_eq!(server.clients(), 0);
    assert!(server.listen_unix(&fixture.path).is_err());
}

/// The kernel's client gives an error to the file system above, and sends again what was left
/// without an answer; it is one of those that know simple replies only.
#[test]
fn test_stop_leaves_without_an_answer_what_a_simple_client_can_send_again() {
    const SENT: u64 = 70;
    for structured in [false, true] {
        let fixture = waiting_fixture(SIZE, 2);
        let mut client = Client::connect(&fixture.path, "vol", structured);
        fixture.device.hold(true);
        let requests: Vec<u8> = (0..SENT)
            .flat_map(|number| write_request(number, number * 512, &[1; 512]))
            .collect();
        // More than may wait at once: the last ones are still to be looked at when the stop comes.
        client.send(&requests);
        let server = Arc::new(fixture.server);
        let stopping = std::thread::spawn({
            let server = Arc::clone(&server);
            move || server.stop()
        });
        eventually("stop listens no more", || {
            UnixStream::connect(&fixture.path).is_err()
        });
        fixture.device.hold(false);
        let mut errors = 0;
        let mut answered = 0;
        while more(&client.stream) {
            answered += 1;
            match client.reply(None).1 {
                Reply::Simple(0) => {}
                Reply::Error(ESHUTDOWN) if structured => errors += 1,
                other => panic!("{other:?}"),
            }
        }
        let content = fixture.device.content.lock().clone();
        let written = content.chunks(512).filter(|sector| sector[0] == 1);
        assert_eq!(
            written.count(),
            answered - errors,
            "what is answered is done"
        );
        if structured {
            assert_eq!(answered, usize::try_from(SENT).unwrap());
            assert!(errors > 0);
        } else {
            assert!(answered < usize::try_from(SENT).unwrap(), "{answered}");
        }
        stopping.join().unwrap();
    }
}

#[test]
fn test_stop_does_not_wait_for_a_client_that_reads_nothing() {
    let device = MemoryDevice {
        waits: true,
        ..MemoryDevice::new(64 << 20)
    };
    let limits = Limits {
        stop_grace: Duration::from_millis(200),
        ..Limits::default()
    };
    let fixture = serve(device, limits);
    let mut deaf = Client::connect(&fixture.path, "vol", true);
    for cookie in 0..3 {
        deaf.send(&request(wire::CMD_READ, 0, cookie, 0, 8 << 20));
    }
    eventually("it runs", || !fixture.device.log.lock().is_empty());
    let begun = Instant::now();
    fixture.server.stop();
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn test_a_dead_servers_socket_is_replaced_and_a_live_ones_is_not() {
    let fixture = fixture();
    let second = Server::new(vec![export("vol", &fixture.device)]);
    let error = second.listen_unix(&fixture.path).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    assert_eq!(Client::connect(&fixture.path, "vol", true).size, SIZE);

    let stale = fixture.path.with_file_name("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    second.listen_unix(&stale).unwrap();
    assert_eq!(Client::connect(&stale, "vol", true).size, SIZE);
    drop(second);
    assert!(!stale.exists());

    let file = fixture.path.with_file_name("precious");
    std::fs::write(&file, "data").unwrap();
    let third = Server::new(vec![export("vol", &fixture.device)]);
    assert!(third.listen_unix(&file).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
}

#[test]
fn test_a_replaced_socket_file_is_left_to_its_new_owner() {
    let fixture = fixture();
    std::fs::remove_file(&fixture.path).unwrap();
    let second = Server::new(vec![export("vol", &fixture.device)]);
    second.listen_unix(&fixture.path).unwrap();
    fixture.server.stop();
    assert_eq!(Client::connect(&fixture.path, "vol", true).size, SIZE);
}

#[test]
fn test_tcp_is_served_without_delay() {
    let fixture = fixture();
    let address = fixture
        .server
        .listen_tcp("127.0.0.1:0".parse().unwrap())
        .unwrap();
    let client = std::net::TcpStream::connect(address).unwrap();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut &client, &mut greeting).unwrap();
    assert_eq!(greeting[..8], *b"NBDMAGIC");
    let accepted: Vec<_> = fixture
        .server
        .inner
        .clients
        .lock()
        .sockets
        .values()
        .cloned()
        .collect();
    assert_eq!(accepted.len(), 1);
    assert!(rustix::net::sockopt::tcp_nodelay(&accepted[0]).unwrap());
    assert!(rustix::net::sockopt::socket_keepalive(&accepted[0]).unwrap());
    assert!(fixture.server.listen_tcp(address).is_err());
}

#[test]
fn test_the_socket_is_for_its_user_only() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = fixture();
    let mode = std::fs::metadata(&fixture.path)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}
