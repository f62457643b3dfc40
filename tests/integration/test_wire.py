"""What a target does with a source that sends nonsense: a FAIL with a code, and nothing changed.

Guards invariant 9 (no byte is believed) on the Ship stream. The client here has the source's own
identity, so that TLS lets it in; the frames it spoils are real ones, from the spool of a tap that
recorded on while its target was away. At the end the true source ships them, and all is well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import xxhash

from ebbtide import _native
from ebbtide.config import load_config
from ebbtide.rpc import framing, replication_pb2_grpc
from ebbtide.rpc import replication_pb2 as pb
from ebbtide.security.peers import load_peers
from ebbtide.security.tls import MESSAGE_BYTES_MAX, client_credentials, client_options
from tests.support.nbd import Client
from tests.support.stack import Host, Stack, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs("root"), pytest.mark.timeout(300)]

SIZE = 4 << 20
HEADER_LEN = 256
#: Offsets of docs/format/frame.md and docs/format/segment.md.
FRAME = {
    "magic": (0, "8s"),
    "version": (8, "<H"),
    "header_len": (10, "<H"),
    "flags": (12, "<I"),
    "group": (16, "16s"),
    "generation_counter": (32, "<Q"),
    "incarnation": (48, "16s"),
    "frame_no": (64, "<I"),
    "suite": (68, "<H"),
    "first_seq": (72, "<Q"),
    "record_count": (96, "<I"),
    "payload_blocks": (100, "<I"),
    "table_len": (104, "<I"),
    "directory_len": (108, "<I"),
    "cells_len": (112, "<I"),
    "ref_floor": (116, "<I"),
    "prev": (200, "32s"),
    "nonce_random": (232, "<I"),
    "reserved": (236, "12s"),
}
SEGMENT = {
    "magic": (0, "8s"),
    "version": (8, "<H"),
    "group": (16, "16s"),
    "generation_counter": (32, "<Q"),
    "incarnation": (48, "16s"),
    "salt": (64, "32s"),
    "first_frame": (100, "<I"),
    "parent_incarnation": (120, "16s"),
    "parent_frame_no": (136, "<I"),
    "parent_digest": (144, "32s"),
}


def forged(data: bytes, layout: dict[str, tuple[int, str]], **fields: Any) -> bytes:
    """A frame or segment header with other fields, and a checksum that agrees with them."""
    changed = bytearray(data)
    for name, value in fields.items():
        offset, kind = layout[name]
        struct.pack_into(kind, changed, offset, value)
    struct.pack_into("<Q", changed, 248, xxhash.xxh3_64_intdigest(bytes(changed[:248])))
    return bytes(changed)


def split(frames: bytes) -> list[bytes]:
    """Single frames of a batch."""
    found = []
    while frames:
        table, directory, cells = struct.unpack_from("<III", frames, 104)
        length = HEADER_LEN + table + directory + cells
        found.append(frames[:length])
        frames = frames[length:]
    return found


@dataclass
class Scene:
    """A target that holds some history, and frames that it does not hold yet."""

    stack: Stack
    channel: grpc.Channel
    group: bytes
    announcement: bytes
    #: The newest frame that the target holds.
    held: bytes
    #: The frames that come next.
    fresh: list[bytes]

    def hello(self, **fields: Any) -> bytes:
        known = pb.Hello(
            protocol=1,
            agent_version="test",
            group=self.group,
            generation_counter=struct.unpack_from("<Q", self.held, 32)[0],
            generation_site=struct.unpack_from("<Q", self.held, 40)[0],
            last_seq=1 << 40,
        )
        known.MergeFrom(pb.Hello(**fields))
        return framing.pack(framing.HELLO, known)

    def talk(self, *messages: bytes) -> list[bytes]:
        """Send all on a stream of its own; what the target answers until it ends."""
        call: Any = self.channel.stream_stream(framing.SHIP_METHOD)
        return list(call(iter(messages), timeout=20))

    def welcome(self) -> pb.Welcome:
        """What the target says it holds."""
        first = self.talk(self.hello())[0]
        assert framing.tag_of(first) == framing.WELCOME, first
        return framing.body_of(first, pb.Welcome)

    def frames(self, *frames: bytes) -> tuple[bytes, ...]:
        """A whole stream that carries these frames, each in a message of its own."""
        return (self.hello(), self.announcement, *(framing.FRAMES + frame for frame in frames))


def next_batches(reader: _native.LogReader, end: _native.LogEnd) -> Iterator[_native.Batch]:
    while (batch := reader.next_batch(end, 1 << 20)) is not None:
        yield batch


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Stack.run(tmp_path_factory.mktemp("w")) as stack:
        stack.protect("ward", {"disk": SIZE})
        with Client(stack.uri("ward", "disk")) as client:
            client.pwrite(os.urandom(4096), 0)
            client.flush()
        made = withhold(stack)
        yield made
        made.channel.close()


def withhold(stack: Stack) -> Scene:
    """Have the tap record what the target does not get, and leave the source's place to us."""
    stack.wait_durable("ward")
    stack.target.kill(signal.SIGTERM)
    with Client(stack.uri("ward", "disk")) as client:
        for number in range(8):
            client.pwrite(os.urandom(8192), number << 16)
            client.flush()
    source = stack.source.source("ward")
    end = _native.LogEnd.from_proto(source.tap.log_end.SerializeToString())
    stack.source.kill(signal.SIGTERM)
    stack.target.start()
    generation = struct.pack("<QQ", source.generation_counter, source.generation_site)
    held = bytes(32) + generation + bytes(HEADER_LEN - 48)
    made = Scene(stack, dial(stack.source, stack.target), source.group, b"", held, [])
    resume = made.welcome().resume
    reader = _native.LogReader(source.spool_dir, source.group)
    reader.seek((resume.incarnation, resume.next_frame - 1))
    frames: list[bytes] = []
    for batch in next_batches(reader, end):
        made.announcement = made.announcement or batch.announcement or b""
        frames += split(batch.message[framing.TAG_LEN :])
    made.held, *made.fresh = frames
    assert len(made.fresh) >= 4
    return made


def dial(source: Host, target: Host) -> grpc.Channel:
    """A channel to the target with the source's certificate."""
    identity, peers = load_peers(load_config(source.config))
    peer = peers.by_name(target.name)
    options = [
        (name, value) for name, value in client_options() if name != "grpc.max_send_message_length"
    ]
    return grpc.secure_channel(
        f"127.0.0.1:{target.port}",
        client_credentials(identity, peer),
        [*options, ("grpc.max_send_message_length", 64 << 20)],
    )


def a_new_incarnation(scene: Scene, **fields: Any) -> bytes:
    """An announcement of an incarnation that follows what the target holds."""
    body = scene.announcement[framing.TAG_LEN :]
    number = struct.unpack_from("<I", scene.held, FRAME["frame_no"][0])[0]
    parent = {
        "incarnation": b"\x5a" * 16,
        "salt": b"\x5b" * 32,
        "parent_incarnation": scene.held[48:64],
        "parent_frame_no": number,
        "parent_digest": scene.welcome().last_digest,
        "first_frame": 0,
    }
    return framing.ANNOUNCE + forged(body, SEGMENT, **{**parent, **fields})


Case = tuple[str, "Callable[[Scene], tuple[bytes, ...]]"]


def spoilt(**fields: Any) -> Callable[[Scene], tuple[bytes, ...]]:
    """The next frame with other fields."""
    return lambda scene: scene.frames(forged(scene.fresh[0], FRAME, **fields))


def flipped(at: int) -> Callable[[Scene], tuple[bytes, ...]]:
    """The next frame with one bit flipped at a place, counted from its end if negative."""

    def flip(scene: Scene) -> tuple[bytes, ...]:
        frame = bytearray(scene.fresh[0])
        frame[at] ^= 1
        return scene.frames(bytes(frame))

    return flip


GREETING: dict[str, Case] = {
    "unknown group": ("unknown-group", lambda s: (s.hello(group=bytes(16)),)),
    "older generation": (
        "fenced",
        lambda s: (framing.pack(framing.HELLO, pb.Hello(protocol=1, group=s.group)),),
    ),
    "unknown protocol": ("version", lambda s: (s.hello(protocol=99),)),
    "no greeting": ("format", lambda s: (framing.FRAMES + s.fresh[0],)),
    "short message": ("format", lambda _: (b"HE",)),
    "empty message": ("format", lambda _: (b"",)),
    "greeting that is no protobuf": ("format", lambda _: (framing.HELLO + b"\xff" * 40,)),
    "garbage tag": ("format", lambda s: (s.hello(), b"\0\1\2\3" + bytes(100))),
    "greeting twice": ("format", lambda s: (s.hello(), s.hello())),
}
ANNOUNCING: dict[str, Case] = {
    "announcement cut short": (
        "damaged",
        lambda s: (s.hello(), s.announcement[:100]),
    ),
    "announcement with a bad checksum": (
        "damaged",
        lambda s: (s.hello(), s.announcement[:-1] + bytes([s.announcement[-1] ^ 1])),
    ),
    "announcement of a newer version": (
        "damaged",
        lambda s: (s.hello(), framing.ANNOUNCE + forged(s.announcement[4:], SEGMENT, version=9)),
    ),
    "announcement of another group": (
        "config",
        lambda s: (
            s.hello(),
            framing.ANNOUNCE + forged(s.announcement[4:], SEGMENT, group=b"\1" * 16),
        ),
    ),
    "announcement of an older generation": (
        "fenced",
        lambda s: (
            s.hello(),
            framing.ANNOUNCE + forged(s.announcement[4:], SEGMENT, generation_counter=0),
        ),
    ),
    "announcement with another salt": (
        "conflict",
        lambda s: (
            s.hello(),
            framing.ANNOUNCE + forged(s.announcement[4:], SEGMENT, salt=b"\1" * 32),
        ),
    ),
    "announcement beyond a hole": (
        "out-of-order",
        lambda s: (
            s.hello(),
            framing.ANNOUNCE + forged(s.announcement[4:], SEGMENT, first_frame=1 << 20),
        ),
    ),
    "parent with another digest": (
        "conflict",
        lambda s: (s.hello(), a_new_incarnation(s, parent_digest=b"\7" * 32)),
    ),
    "incarnation that does not begin at its beginning": (
        "out-of-order",
        lambda s: (s.hello(), a_new_incarnation(s, first_frame=9)),
    ),
}
FRAMES: dict[str, Case] = {
    "frame of an unannounced incarnation": (
        "unknown-incarnation",
        spoilt(incarnation=b"\1" * 16),
    ),
    "wrong magic": ("damaged", spoilt(magic=b"GARBAGE!")),
    "wrong version": ("damaged", spoilt(version=7)),
    "wrong header length": ("damaged", spoilt(header_len=128)),
    "unknown flags": ("damaged", spoilt(flags=1 << 31)),
    "reserved bytes": ("damaged", spoilt(reserved=b"\1" * 12)),
    "unknown suite": ("damaged", spoilt(suite=77)),
    "bad header checksum": ("damaged", flipped(250)),
    "bad body": ("damaged", flipped(-1)),
    "bad record table": ("damaged", flipped(HEADER_LEN)),
    "table length beyond the limit": ("damaged", spoilt(table_len=0xFFFF_FFFF)),
    "directory length beyond the limit": ("damaged", spoilt(directory_len=0xFFFF_FFFF)),
    "cells length beyond the limit": ("damaged", spoilt(cells_len=0xFFFF_FFFF)),
    "record count beyond the limit": ("damaged", spoilt(record_count=0xFFFF_FFFF)),
    "payload beyond the limit": ("damaged", spoilt(payload_blocks=0xFFFF_FFFF)),
    "truncated header": ("damaged", lambda s: s.frames(s.fresh[0][:100])),
    "truncated frame": ("damaged", lambda s: s.frames(s.fresh[0][:-1])),
    "bytes behind a frame": (
        "damaged",
        lambda s: s.frames(s.fresh[0] + b"\0"),
    ),
    "frame of another group": ("config", spoilt(group=b"\1" * 16)),
    "frame of an older generation": ("fenced", spoilt(generation_counter=0)),
    "frame of a newer generation than announced": ("damaged", spoilt(generation_counter=9)),
    "frames reordered": ("out-of-order", lambda s: s.frames(s.fresh[1], s.fresh[0])),
    "frame left out": ("out-of-order", lambda s: s.frames(s.fresh[2])),
    "frames reordered in one message": (
        "out-of-order",
        lambda s: s.frames(s.fresh[1] + s.fresh[0]),
    ),
    "broken chain": ("broken-chain", spoilt(prev=b"\7" * 32)),
    "held frame with another digest": (
        "conflict",
        lambda s: s.frames(forged(s.held, FRAME, prev=b"\7" * 32)),
    ),
    "seq given twice": ("seq-reused", spoilt(first_seq=1)),
}
ALL = {**GREETING, **ANNOUNCING, **FRAMES}


@pytest.mark.parametrize("what", ALL)
def test_nonsense_ends_the_stream_with_its_code(scene: Scene, what: str) -> None:
    code, messages = ALL[what]
    before = scene.welcome()
    answers = scene.talk(*messages(scene))
    assert framing.tag_of(answers[-1]) == framing.FAIL, answers
    failure = framing.body_of(answers[-1], pb.ShipFailure)
    assert failure.code == code, failure
    assert failure.message
    assert not failure.retry
    if code == "fenced":
        assert failure.promised_counter >= 1 or what not in GREETING
    assert scene.welcome() == before
    assert scene.stack.target.target("ward").durable_seq == before.last_seq


def test_frames_that_are_held_are_taken_for_held(scene: Scene) -> None:
    before = scene.welcome()
    answers = scene.talk(*scene.frames(scene.held, scene.held, scene.held + scene.held))
    assert {framing.tag_of(answer) for answer in answers} == {framing.WELCOME, framing.ACKNOWLEDGE}
    said = framing.body_of(answers[-1], pb.Acknowledgement)
    assert said.received_seq == before.last_seq
    assert scene.welcome() == before


def test_floor_below_what_a_new_target_holds(scene: Scene) -> None:
    """A target that begins in the middle of an incarnation needs all that its frames refer to."""
    group = b"\x6b" * 16
    replication = replication_pb2_grpc.ReplicationStub(scene.channel)
    replication.Offer(pb.OfferRequest(group=group, name="empty", suite=1, key=bytes(32)))
    try:
        body = forged(scene.announcement[framing.TAG_LEN :], SEGMENT, group=group, first_frame=9)
        frame = forged(scene.fresh[0], FRAME, group=group, frame_no=9, ref_floor=3)
        answers = scene.talk(
            scene.hello(group=group), framing.ANNOUNCE + body, framing.FRAMES + frame
        )
        assert framing.tag_of(answers[-1]) == framing.FAIL, answers
        assert framing.body_of(answers[-1], pb.ShipFailure).code == "below-floor"
        welcome = framing.body_of(scene.talk(scene.hello(group=group))[0], pb.Welcome)
        assert not welcome.HasField("resume")
    finally:
        replication.Withdraw(pb.WithdrawRequest(group=group, drop=True))


def test_message_beyond_the_limit_ends_the_stream(scene: Scene) -> None:
    """gRPC refuses it before we see it, so that its own status is the answer."""
    before = scene.welcome()
    with pytest.raises(grpc.RpcError) as caught:
        scene.talk(scene.hello(), framing.FRAMES + bytes(MESSAGE_BYTES_MAX))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert scene.welcome() == before


def test_stranger_is_not_let_in(scene: Scene, tmp_path: Path) -> None:
    stranger = Host("source", tmp_path / "stranger", 1)
    stranger.lay_out()
    stranger.pin(scene.stack.target)
    with dial(stranger, scene.stack.target) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(framing.SHIP_METHOD)(iter([scene.hello()]), timeout=20))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def equal(stack: Stack) -> bool:
    with (
        contextlib.suppress(grpc.RpcError),
        Client(stack.uri("ward", "disk")) as source,
        stack.view("ward") as view,
        Client(view.volumes[0].nbd_uri) as newest,
    ):
        return source.read_all() == newest.read_all()
    return False


def test_true_source_goes_on_after_all_this(scene: Scene) -> None:
    """After the tests above: the frames that were spoilt there arrive whole."""
    stack = scene.stack
    stack.source.start()
    stack.wait_durable("ward")
    assert equal(stack)
    assert not stack.source.source("ward").shipping.detail


def test_lines_that_parted_are_joined_by_a_new_incarnation(scene: Scene) -> None:
    """Last of the file: what no check without the key finds is in the target's history.

    The next true frame does not continue it; the source begins anew with a whole copy.
    """
    stack = scene.stack
    parted = withhold(stack)
    before = parted.welcome()
    answers = parted.talk(*parted.frames(forged(parted.fresh[0], FRAME, nonce_random=7)))
    assert {framing.tag_of(answer) for answer in answers} == {framing.WELCOME, framing.ACKNOWLEDGE}
    assert parted.welcome().last_seq > before.last_seq
    parted.channel.close()
    stack.source.start()

    def noticed() -> bool:
        return any("copied again" in notice for notice in stack.source.source("ward").notices)

    eventually(noticed, what="the source notices")
    eventually(lambda: equal(stack), what="the newest point is the volume again")
    with stack.view("ward", at_seq=before.last_seq, exact=True) as view:
        assert view.seq == before.last_seq
