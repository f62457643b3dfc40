"""`ebb` as scripts see it: arguments to requests, answers to JSON, failures to exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from ebbtide.cli.app import run
from ebbtide.config import load_config
from ebbtide.errors import ExitCode
from ebbtide.rpc import agent_pb2, control_pb2
from tests.unit.fake_agent import NOW, FakeAgent, full_status, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert run(["init", "--dir", str(tmp_path / "ebb"), "--name", "his-a"]) == 0
    return tmp_path / "ebb"


@pytest.fixture
def agent(home: Path) -> Iterator[FakeAgent]:
    yield from serve(home / "agent.sock")


@pytest.fixture
def ebb(home: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    capfd.readouterr()

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(["--config", str(home / "agent.toml"), *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def test_init_makes_what_the_agent_reads(home: Path) -> None:
    config = load_config(home / "agent.toml")
    assert config.agent.name == "his-a"
    for path in (config.identity.key, config.identity.master_key, home / "agent.toml"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert config.source.spool_dir.is_dir()
    assert home.stat().st_mode & 0o077 == 0


def test_init_replaces_nothing_and_leaves_nothing_half_made(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (home / "agent.toml").read_bytes()
    assert run(["init", "--dir", str(home)]) == ExitCode.REFUSED
    assert (home / "agent.toml").read_bytes() == before
    for bad in (["--listen", "nowhere"], ["--name", 'a"b'], ["--spool-bytes-max", "lots"]):
        assert run(["init", "--dir", str(tmp_path / "new"), *bad]) == ExitCode.CONFIG
        assert not (tmp_path / "new").exists()
    assert "hint:" in capfd.readouterr().err


def test_status_json_is_complete(agent: FakeAgent, ebb: Any) -> None:
    agent.answers["Status"] = full_status()
    code, out, err = ebb("status", "his", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert set(answer) == {field.name for field in agent_pb2.AgentStatus.DESCRIPTOR.fields}
    group = answer["sources"][0]
    assert group["group"] == bytes(range(16)).hex()
    assert group["state"] == "serving"
    assert group["generation_site"] == "f" * 16
    assert group["shipping"]["lag_us"] == 12_345
    assert group["copying"] is None
    assert [c["word"] for c in group["conditions"]] == ["protected"]
    assert answer["targets"][0]["conditions"][0]["word"] == "receiving"
    assert agent.only_request("Status").group == "his"


def test_status_for_people_in_any_width(
    agent: FakeAgent, ebb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.answers["Status"] = full_status()
    for width in (40, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, _ = ebb("status")
        assert code == 0
        for said in ("PROTECTED", "lag 12.3 ms", "3 writes behind", "/dev/loop3", "RECEIVING"):
            assert said in out


def test_watch_prints_a_line_each(agent: FakeAgent, ebb: Any) -> None:
    agent.answers["Watch"] = [full_status(), full_status()]
    code, out, _ = ebb("status", "--watch", "--interval", "250ms", "--json")
    assert code == 0
    assert [json.loads(line)["name"] for line in out.splitlines()] == ["his-a", "his-a"]
    assert agent.only_request("Watch").interval_ms == 250


def test_protect_sends_what_was_asked(
    agent: FakeAgent, ebb: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    agent.answers["Protect"] = agent_pb2.SourceGroup(name="his")
    code, out, err = ebb(
        *("protect", "his", "data=/dev/vg0/his", "wal=his-wal.img", "--to", "refuge"),
        *("--suite", "aes-256-gcm", "--spool-bytes-max", "2GiB", "--create", "64MiB"),
    )
    assert code == 0, err
    assert "next: ebb attach his" in out
    request = agent.only_request("Protect")
    assert [(v.name, v.backing, v.create_bytes) for v in request.volumes] == [
        ("data", "/dev/vg0/his", 64 << 20),
        ("wal", str(home / "his-wal.img"), 64 << 20),
    ]
    assert (request.target_peer, request.suite, request.spool_bytes_max) == ("refuge", 2, 2 << 30)


@pytest.mark.parametrize(
    "arguments",
    [
        ("protect", "his", "data"),
        ("protect", "his", "=x"),
        ("protect", "his", "a=x", "a=y"),
        ("protect", "his", "a=x", "--create", "lots"),
        ("protect",),
        ("attach",),
        ("attach", "his", "--view", "v1"),
        ("view", "open", "his", "--at", "noon"),
        ("view", "open", "his", "--at", "now", "--seq", "3"),
        ("status", "--interval", "1us"),
        ("--agent", "here:x", "status"),
        ("points", "his", "--from", "2026-03-01T00:00:00"),
        ("frobnicate",),
        ("status", "--frobnicate"),
    ],
)
def test_nonsense_is_usage(agent: FakeAgent, ebb: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = ebb(*arguments)
    assert (code, out) == (ExitCode.USAGE, "")
    assert err.startswith("error: ")
    assert agent.requests == []


@pytest.mark.parametrize("kind", range(1, 11))
def test_each_failure_has_its_exit_code(agent: FakeAgent, ebb: Any, kind: int) -> None:
    agent.failures["Bookmark"] = agent_pb2.AgentFailure(
        kind=agent_pb2.AgentFailure.Kind.ValueType(kind),
        code="some-word",
        message="it is [so]",
        hint="do [that]",
    )
    code, out, err = ebb("bookmark", "his", "x")
    assert (code, out) == (kind, "")
    assert err == "error: it is [so]\nhint: do [that]\n"
    agent.requests.clear()
    code, _, err = ebb("bookmark", "his", "x", "--json")
    assert json.loads(err)["error"] == {
        "code": "some-word",
        "message": "it is [so]",
        "hint": "do [that]",
        "exit_code": kind,
    }


def test_no_agent(ebb: Any, home: Path) -> None:
    code, _, err = ebb("status")
    assert code == ExitCode.UNREACHABLE
    assert "no agent runs here" in err
    assert "hint: start the agent" in err
    (home / "agent.sock").write_text("")
    assert ebb("status")[0] == ExitCode.UNREACHABLE


def test_socket_without_a_listener(ebb: Any, home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "agent.sock"))
    code, _, err = ebb("status")
    assert code == ExitCode.UNREACHABLE
    assert "does not answer" in err


def test_misspelt_key(ebb: Any, home: Path) -> None:
    path = home / "agent.toml"
    path.write_text(path.read_text().replace("spool_bytes_max", "spool_byte_max"))
    code, _, err = ebb("status")
    assert code == ExitCode.CONFIG
    assert "did you mean 'spool_bytes_max'?" in err


@pytest.mark.usefixtures("agent")
def test_an_older_agent(ebb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unimplemented(*arguments: Any) -> None:
        arguments[-1].abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")

    monkeypatch.setattr(FakeAgent, "_answer", unimplemented)
    code, _, err = ebb("points", "his")
    assert code == ExitCode.CONFIG
    assert "same version" in err


def test_deleting_history_asks_first(agent: FakeAgent, ebb: Any) -> None:
    agent.answers["Unprotect"] = agent_pb2.UnprotectResult(dropped=["/x"])
    code, _, err = ebb("unprotect", "his", "--delete-history")
    assert code == ExitCode.REFUSED
    assert "--yes" in err
    assert agent.requests == []
    assert ebb("unprotect", "his", "--delete-history", "--yes")[0] == 0
    assert agent.only_request("Unprotect").history == agent_pb2.UnprotectRequest.HISTORY_DROP


def test_history_is_kept_by_default(agent: FakeAgent, ebb: Any) -> None:
    agent.answers["Unprotect"] = agent_pb2.UnprotectResult(kept=["/journal"])
    code, out, _ = ebb("unprotect", "his")
    assert code == 0
    assert "history kept in /journal" in out
    assert agent.only_request("Unprotect").history == agent_pb2.UnprotectRequest.HISTORY_KEEP


def test_points_for_people_and_programs(agent: FakeAgent, ebb: Any) -> None:
    answer = agent_pb2.PointsResult(name="his", record_count=1234, log_bytes=1 << 20)
    answer.horizon.seq, answer.horizon.time_us = 1, NOW - 60_000_000
    answer.newest.seq, answer.newest.time_us = 1200, NOW
    answer.last_record.seq, answer.last_record.time_us = 1234, NOW + 1
    answer.bookmarks.add(seq=7, time_us=NOW, label="before [the] upgrade")
    answer.gaps.add(seq=9, first_time_us=NOW, end_time_us=NOW + 5, bytes=4096, cause="spool-full")
    answer.spans.add(first_seq=1201, first_time_us=NOW, cause="first copy")
    answer.records.add(seq=3, time_us=NOW, kind="write", volume="data", offset=4096, length=512)
    agent.answers["Points"] = answer
    code, out, _ = ebb("points", "his", "--writes", "--from", "now-1h", "--limit", "5")
    assert code == 0
    said = ("before [the] upgrade", "spool-full", "inconsistent span", "data 4096+512", "1m 00s")
    assert all(text in out for text in (*said, "1,234 records", "open inconsistent span"))
    request = agent.only_request("Points")
    assert request.limit == 5
    assert request.from_us > 0
    code, out, _ = ebb("points", "his", "--json")
    assert json.loads(out)["gaps"][0]["cause"] == "spool-full"
    assert json.loads(out)["spans"][0]["end_seq"] == 0


def test_no_point_yet(agent: FakeAgent, ebb: Any) -> None:
    agent.answers["Points"] = agent_pb2.PointsResult(name="his")
    code, out, _ = ebb("points", "his")
    assert code == 0
    assert "no recovery point yet" in out
    _, out, _ = ebb("points", "his", "--json")
    assert json.loads(out)["newest"] is None


def test_views(agent: FakeAgent, ebb: Any, home: Path) -> None:
    view = agent_pb2.View(
        id="v1",
        group_name="his",
        seq=7,
        time_us=NOW,
        writable=True,
        overlay_bytes=4096,
        state=agent_pb2.View.STATE_SERVING,
        open_took_us=12_000,
    )
    view.volumes.add(name="data", size=1 << 20, nbd_uri="nbd+unix:///data?socket=/x")
    agent.answers["OpenView"] = view
    agent.answers["ListViews"] = agent_pb2.ListViewsResult(views=[view])
    agent.answers["CloseView"] = agent_pb2.CloseViewResult()
    agent.answers["MountView"] = agent_pb2.Mount(volume="data", directory=str(home))
    agent.answers["UnmountView"] = agent_pb2.UnmountViewResult(directories=[str(home)])
    code, out, _ = ebb("view", "open", "his", "--at", f"@{NOW}", "--exact", "--writable")
    assert code == 0
    assert "opened in 12.0 ms" in out
    request = agent.only_request("OpenView")
    assert (request.point.at_time_us, request.point.exact, request.writable) == (NOW, True, True)
    assert ebb("view", "list")[0] == 0
    assert ebb("view", "mount", "v1", str(home), "--read-only")[0] == 0
    assert agent.only_request("MountView").read_only
    assert ebb("view", "unmount", "v1")[0] == 0
    agent.requests.clear()
    code, _, err = ebb("view", "close", "v1")
    assert code == ExitCode.REFUSED, "4 KiB were written to it"
    assert "4.0 KiB" in err
    assert ebb("view", "close", "v1", "--yes")[0] == 0
    assert agent.only_request("CloseView").view == "v1"


def test_attach_and_detach(agent: FakeAgent, ebb: Any) -> None:
    device = agent_pb2.AttachedDevice(
        volume="data", device="/dev/loop3", method=agent_pb2.ATTACH_METHOD_FUSE_LOOP
    )
    agent.answers["Attach"] = agent_pb2.AttachResult(devices=[device])
    agent.answers["Detach"] = agent_pb2.DetachResult(devices=[device])
    code, out, _ = ebb("attach", "his")
    assert (code, out) == (0, "data  /dev/loop3  (fuse-loop)\n")
    code, out, _ = ebb("attach", "--view", "v1", "--json")
    assert json.loads(out)["devices"][0]["method"] == "fuse-loop"
    assert ebb("detach", "his")[1] == "data  /dev/loop3 is gone\n"


def test_bookmark(agent: FakeAgent, ebb: Any) -> None:
    agent.answers["Bookmark"] = control_pb2.BookmarkPlaced(seq=7, time_us=NOW)
    code, out, _ = ebb("bookmark", "his", "before upgrade", "--json")
    assert code == 0
    assert json.loads(out) == {"label": "before upgrade", "seq": 7, "time_us": NOW}


def test_restore_needs_the_last_word(agent: FakeAgent, ebb: Any, home: Path) -> None:
    half = agent_pb2.RestoreProgress(volume="data", bytes_done=5, bytes_total=10)
    done = agent_pb2.RestoreProgress(bytes_done=10, bytes_total=10, seq=7, time_us=NOW, done=True)
    agent.answers["Restore"] = [half, done]
    code, out, _ = ebb("restore", "his", f"data={home}/new.img", "--seq", "7", "--json")
    assert code == 0
    assert [json.loads(line)["done"] for line in out.splitlines()] == [False, True]
    request = agent.only_request("Restore")
    assert (request.volumes[0].path, request.volumes[0].overwrite) == (f"{home}/new.img", False)
    agent.answers["Restore"] = [half]
    code, _, err = ebb("restore", "his", f"data={home}/new.img", "--force")
    assert code == ExitCode.INTERNAL
    assert "not complete" in err


def test_doctor_finds_and_grades(agent: FakeAgent, ebb: Any, home: Path) -> None:
    finding = agent_pb2.Finding(
        check="peer-reachable",
        subject="refuge",
        level=agent_pb2.Finding.LEVEL_FAILURE,
        message="does not answer",
        hint="look there",
    )
    agent.answers["Diagnose"] = agent_pb2.DiagnoseResult(findings=[finding])
    code, out, _ = ebb("doctor", "--json")
    assert code == ExitCode.REFUSED
    answer = json.loads(out)
    assert answer["agent_running"]
    graded = {(f["check"], f["subject"]): f["grade"] for f in answer["findings"]}
    assert graded["peer-reachable", "refuge"] == "fail"
    assert graded["master-key", str(home / "identity/master.key")] == "ok"
    (home / "identity/master.key").chmod(0o644)
    code, out, _ = ebb("doctor")
    assert "can be read by others" in out
    assert "hint: chmod 600" in out


def subprocess_ebb(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ebbtide.cli", "--config", str(home / "agent.toml"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def endless() -> Iterator[agent_pb2.AgentStatus]:
    while True:
        yield full_status()
        time.sleep(0.02)


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_a_closed_pipe_ends_quietly(
    agent: FakeAgent, home: Path, json_option: tuple[str, ...]
) -> None:
    agent.answers["Watch"] = endless()
    with subprocess_ebb(home, "status", "--watch", *json_option) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == ExitCode.CLOSED_PIPE
        assert process.stderr.read() == ""


def test_control_c_ends_quietly_and_cancels(agent: FakeAgent, home: Path) -> None:
    agent.answers["Watch"] = endless()
    with subprocess_ebb(home, "status", "--watch", "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(20) == ExitCode.INTERRUPTED
        assert process.stderr.read() == ""
    assert agent.cancelled.wait(5)


@pytest.mark.usefixtures("agent")
def test_a_defect_is_no_traceback(ebb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebbtide.cli.points.parse_time", lambda _: 1 // 0)
    code, _, err = ebb("points", "his", "--from", "now")
    assert code == ExitCode.INTERNAL
    assert "ZeroDivisionError" in err
    assert "EBB_DEBUG=1" in err


@pytest.mark.usefixtures("agent")
def test_remote_paths_stay_as_they_are(ebb: Any) -> None:
    code, _, err = ebb("--agent", "refuge", "protect", "his", "data=relative.img")
    assert code == ExitCode.USAGE
    assert "absolute" in err
    code, _, err = ebb("--agent", "refuge", "status")
    assert code == ExitCode.NOT_FOUND
    assert "no peer is called 'refuge'" in err


def test_help_of_every_verb(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    verbs = capfd.readouterr().out
    names = "demo init doctor agent protect unprotect attach detach status points bookmark restore"
    for name in names.split():
        assert name in verbs
        assert run([name, "--help"]) == 0
    for name in ("open", "list", "close", "mount", "unmount"):
        assert run(["view", name, "--help"]) == 0
    assert "--json" in capfd.readouterr().out
