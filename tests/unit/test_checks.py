"""`ebb doctor`: each check can end both ways, on a made-up host where the real one cannot."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ebbtide.cli import checks
from ebbtide.cli.checks import Finding, Grade
from ebbtide.cli.init import default_name
from ebbtide.config import Config, load_config
from tests.unit.test_cli import run

MOUNTS = """\
22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 0:25 / /run rw - tmpfs tmpfs rw
31 22 7:0 / /srv rw - xfs /dev/loop0 rw
32 31 7:1 / /srv/deep\\040er rw - ext4 /dev/loop1 rw
broken line
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    assert run(["init", "--dir", str(tmp_path / "ebb"), "--listen", "127.0.0.1:0"]) == 0
    return load_config(tmp_path / "ebb/agent.toml")


def grade_of(findings: list[Finding], check: str) -> Grade:
    return max(
        (finding.grade for finding in findings if finding.check == check),
        key=[Grade.OK, Grade.WARN, Grade.FAIL].index,
    )


def test_a_fresh_directory_is_well(config: Config) -> None:
    findings = checks.of_config(config, agent_runs=False)
    for check in ("certificate", "master-key", "port"):
        assert grade_of(findings, check) is Grade.OK


def test_missing_and_open_files(config: Config) -> None:
    config.identity.key.unlink()
    config.identity.master_key.write_text("zz")
    config.source.spool_dir.rmdir()
    findings = checks.of_config(config, agent_runs=True)
    for check in ("certificate", "master-key", "spool"):
        assert grade_of(findings, check) is Grade.FAIL
    assert all(finding.hint for finding in findings if finding.grade is Grade.FAIL)


def test_taken_port(config: Config) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        agent = config.agent.model_copy(update={"listen": listen})
        other = config.model_copy(update={"agent": agent})
        assert grade_of(checks.of_config(other, agent_runs=False), "port") is Grade.FAIL
        assert grade_of(checks.of_config(other, agent_runs=True), "port") is Grade.OK


def test_a_bare_kernel(tmp_path: Path) -> None:
    findings = checks.of_host(tmp_path)
    for check in ("fuse", "loop", "attach"):
        assert grade_of(findings, check) is Grade.WARN
    (tmp_path / "dev").mkdir()
    for name in ("fuse", "loop-control"):
        (tmp_path / "dev" / name).touch()
    findings = checks.of_host(tmp_path)
    assert grade_of(findings, "fuse") is Grade.OK
    assert "attach" not in [finding.check for finding in findings]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc/passwd", ("ext4", "/dev/vda")),
        ("/runner", ("ext4", "/dev/vda")),
        ("/run/x", ("tmpfs", "tmpfs")),
        ("/srv/a", ("xfs", "/dev/loop0")),
        ("/srv/deep er/b", ("ext4", "/dev/loop1")),
    ],
)
def test_which_file_system_holds_a_path(path: str, expected: tuple[str, str]) -> None:
    assert checks.mount_of(Path(path), MOUNTS) == expected


def test_a_device_of_ours_is_seen_through_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("loop5/loop", "dm-0/slaves/loop5", "dm-1/slaves/vda", "vda"):
        (tmp_path / path).mkdir(parents=True)
    backing = tmp_path / "loop5/loop/backing_file"
    backing.write_text("/run/fuse-his/data\n")
    monkeypatch.setattr(checks, "mount_of", lambda _: ("fuse", "ebbtide:his"))
    assert checks.own_device("/dev/dm-0", tmp_path) == "/run/fuse-his/data"
    assert checks.own_device("/dev/dm-1", tmp_path) == ""
    monkeypatch.setattr(checks, "mount_of", lambda _: ("ext4", "/dev/vda"))
    assert checks.own_device("/dev/loop5", tmp_path) == ""


def test_peers_that_do_not_answer(config: Config, tmp_path: Path) -> None:
    assert run(["init", "--dir", str(tmp_path / "b"), "--name", "b"]) == 0
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        path = tmp_path / "ebb/agent.toml"
        path.write_text(
            path.read_text() + f'[peer.b]\naddress = "{address}"\n'
            f'certificate = "{tmp_path}/b/identity/agent.crt"\n'
        )
        (finding,) = checks.of_peers(load_config(path))
        assert (finding.check, finding.grade) == ("peer", Grade.WARN)
        closed.listen()
        (finding,) = checks.of_peers(load_config(path))
        assert finding.grade is Grade.FAIL
    assert config.agent.name


@pytest.mark.parametrize(
    ("host", "name"),
    [("HIS-1.example.org", "his-1"), ("db_7", "db-7"), ("--", "agent"), ("x" * 80, "x" * 63)],
)
def test_agent_name_from_the_host(host: str, name: str) -> None:
    assert default_name(host) == name
