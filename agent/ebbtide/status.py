"""Turns what runs into the messages of the control service. Reads, changes nothing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from urllib.parse import quote

from ebbtide.control.supervisor import ProcessState
from ebbtide.errors import EbbError
from ebbtide.rpc import agent_pb2 as api
from ebbtide.rpc.failure import to_message
from ebbtide.source.shipper import ShipState
from ebbtide.target.journal import free_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from ebbtide.control.state import Attachment
    from ebbtide.rpc import control_pb2 as pb
    from ebbtide.source.groups import Group
    from ebbtide.source.shipper import Shipper
    from ebbtide.source.tap import Tap
    from ebbtide.target.journals import TargetGroup
    from ebbtide.target.views import View

REGION_BYTES = 1 << 20

_SOURCE_STATE = {
    ProcessState.STARTING: api.SourceGroup.STATE_STARTING,
    ProcessState.SERVING: api.SourceGroup.STATE_SERVING,
    ProcessState.RESTARTING: api.SourceGroup.STATE_RESTARTING,
    ProcessState.FAILED: api.SourceGroup.STATE_FAILED,
    ProcessState.STOPPED: api.SourceGroup.STATE_FAILED,
}
_VIEW_STATE = {
    ProcessState.STARTING: api.View.STATE_STARTING,
    ProcessState.SERVING: api.View.STATE_SERVING,
    ProcessState.RESTARTING: api.View.STATE_RESTARTING,
    ProcessState.FAILED: api.View.STATE_FAILED,
    ProcessState.STOPPED: api.View.STATE_FAILED,
}
_SHIP_STATE = {
    ShipState.CONNECTING: api.Shipping.STATE_CONNECTING,
    ShipState.CATCHING_UP: api.Shipping.STATE_CATCHING_UP,
    ShipState.STREAMING: api.Shipping.STATE_STREAMING,
    ShipState.DISCONNECTED: api.Shipping.STATE_DISCONNECTED,
    ShipState.PAUSED: api.Shipping.STATE_PAUSED,
    ShipState.REFUSED: api.Shipping.STATE_REFUSED,
}


def nbd_uri(socket: Path, export: str) -> str:
    """NBD URI of an export on a unix socket."""
    return f"nbd+unix:///{quote(export)}?socket={quote(str(socket), safe='/')}"


def _device(attachment: Attachment | None, volume: str) -> str:
    return attachment.devices.get(volume, "") if attachment else ""


async def source_group(group: Group) -> api.SourceGroup:
    """One protected group."""
    tap, record = group.tap, group.record
    # Asked anew each time: who waits for what was written just now must not see an older number.
    with contextlib.suppress(EbbError):
        await tap.refresh()
    state = _SOURCE_STATE[tap.state]
    status = tap.status
    if tap.state is ProcessState.SERVING and status is not None and status.mode == "extents-only":
        state = api.SourceGroup.STATE_EXTENTS_ONLY
    message = api.SourceGroup(
        group=record.group_id,
        name=record.name,
        state=state,
        suite=record.suite,
        generation_counter=record.generation_counter,
        generation_site=record.generation_site,
        spool_dir=record.spool_dir,
        spool_bytes_max=record.spool_bytes_max,
        tap_at_us=tap.status_at_us,
        nbd_unix=str(tap.nbd_unix),
        nbd_tcp=status.nbd_tcp if status else record.nbd_tcp,
        tap_restarts=tap.restarts,
    )
    with contextlib.suppress(OSError):
        message.spool_free_bytes = free_bytes(record.spool_dir)
    if tap.failure is not None:
        message.failure.CopyFrom(to_message(tap.failure))
    sizes: dict[int, int] = {}
    if status is not None:
        message.tap.CopyFrom(status)
        message.notices.extend(status.notices)
        sizes = {volume.index: volume.size for volume in status.volumes}
        _copying(message, status)
    for volume in record.volumes:
        message.volumes.add(
            index=volume.index,
            name=volume.name,
            backing=volume.backing,
            size=sizes.get(volume.index, 0),
            nbd_uri=nbd_uri(tap.nbd_unix, volume.name),
            device=_device(group.devices.attachment, volume.name),
        )
    rates = tap.rates
    message.rates.writes = rates.rate(0)
    message.rates.write_bytes = rates.rate(1)
    message.rates.reads = rates.rate(2)
    message.rates.read_bytes = rates.rate(3)
    message.rates.frame_bytes = rates.rate(4)
    if group.shipper is not None:
        message.shipping.CopyFrom(_shipping(group.shipper, tap, record.durable_seq))
        message.notices.extend(group.shipper.notices)
    if group.index is not None and group.index.error:
        message.notices.append(f"history is not indexed, views open slower: {group.index.error}")
    return message


def _copying(message: api.SourceGroup, status: pb.TapStatus) -> None:
    if status.copy_regions_left == 0:
        return
    left = status.copy_regions_left * REGION_BYTES
    message.copying.bytes_left = left
    message.copying.bytes_total = status.copy_regions_total * REGION_BYTES
    message.copying.bytes_per_s = status.copy_bytes_per_s
    message.copying.eta_s = left / status.copy_bytes_per_s if status.copy_bytes_per_s else -1.0


def _shipping(shipper: Shipper, tap: Tap, durable_seq: int) -> api.Shipping:
    lag_bytes = shipper.lag_bytes()
    if shipper.connected_since_us:
        shipper.rates.sample(shipper.shipped_bytes)
    rate = shipper.rates.rate() if shipper.connected_since_us else 0.0
    # New frames come while old ones go: only the difference catches up.
    gain = rate - tap.rates.rate(4)
    eta_s = 0.0 if lag_bytes == 0 else lag_bytes / gain if gain > 0 else -1.0
    return api.Shipping(
        peer=shipper.peer,
        address=shipper.address,
        state=_SHIP_STATE[shipper.state],
        detail=shipper.detail,
        received_seq=shipper.received_seq,
        durable_seq=durable_seq,
        durable_time_us=shipper.durable_time_us,
        lag_us=shipper.lag_us(),
        lag_bytes=lag_bytes,
        lag_writes=shipper.lag_writes(),
        ack_p50_us=shipper.latency.at(0.50),
        ack_p99_us=shipper.latency.at(0.99),
        shipped_bytes=shipper.shipped_bytes,
        shipped_frames=shipper.shipped_frames,
        bytes_per_s=rate,
        eta_s=eta_s,
        connected_since_us=shipper.connected_since_us,
        connects=shipper.connects,
        rtt_us=shipper.rtt_us,
    )


def target_group(group: TargetGroup, volumes: list[pb.VolumeStatus]) -> api.TargetGroup:
    """One group whose history is kept here."""
    record, journal = group.record, group.journal
    if journal.failure is not None:
        state, detail = api.TargetGroup.STATE_FAILED, journal.failure.message
    elif journal.paused:
        state, detail = api.TargetGroup.STATE_PAUSED, f"paused: {journal.paused}"
    elif group.connected_since_us:
        state, detail = api.TargetGroup.STATE_RECEIVING, ""
    else:
        state, detail = api.TargetGroup.STATE_WAITING, ""
    journal.rates.sample(journal.appended_bytes)
    message = api.TargetGroup(
        group=record.group_id,
        name=record.name,
        state=state,
        detail=detail,
        source_peer=record.source_peer,
        generation_counter=record.promised_counter,
        generation_site=record.promised_site,
        journal_dir=record.journal_dir,
        journal_bytes=journal.appended.total_bytes if journal.appended else 0,
        received_seq=journal.appended.last_seq if journal.appended else 0,
        durable_seq=journal.durable.last_seq if journal.durable else 0,
        durable_time_us=journal.durable.last_time_us if journal.durable else 0,
        received_bytes=journal.appended_bytes,
        bytes_per_s=journal.rates.rate(),
        volumes=volumes,
        notices=journal.notices,
        connected_since_us=group.connected_since_us,
    )
    with contextlib.suppress(OSError):
        message.free_bytes = free_bytes(record.journal_dir)
    return message


async def view(open_view: View) -> api.View:
    """One open view."""
    record, server = open_view.record, open_view.server
    status = await server.refresh()
    message = api.View(
        id=record.view,
        group=open_view.log.group_id,
        group_name=open_view.log.name,
        seq=record.seq,
        time_us=record.time_us,
        writable=bool(record.overlay_dir),
        state=_VIEW_STATE[server.state],
        detail=server.failure.message if server.failure else "",
        nbd_unix=str(server.nbd_unix),
        nbd_tcp=status.nbd_tcp if status else record.nbd_tcp,
        opened_us=record.opened_us,
        open_took_us=record.open_took_us,
        pid=server.pid,
    )
    if status is not None:
        message.overlay_bytes = status.overlay_bytes
        message.clients = status.clients
        for volume in status.volumes:
            message.volumes.add(
                index=volume.index,
                name=volume.name,
                size=volume.size,
                nbd_uri=nbd_uri(server.nbd_unix, volume.name),
                device=_device(record.attachment, volume.name),
            )
    for mount in record.mounts:
        message.mounts.add(
            volume=mount.volume,
            device=mount.device,
            directory=mount.directory,
            filesystem=mount.filesystem,
            options=mount.options,
        )
    return message
