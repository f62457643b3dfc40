"""Short directories for processes: a unix socket's path has at most 107 bytes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In place of pytest's own, whose names grow with those of the tests."""
    directory = Path(tempfile.mkdtemp(prefix="ebb-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)
