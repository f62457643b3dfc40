"""Guards what a reader stumbles over: unfinished marks, long files, dead links, odd letters."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES_MAX = 600
COLUMNS_MAX = 100
# Classes of one letter, so that this file does not find itself.
UNFINISHED = re.compile(r"[T]ODO|[F]IXME|[u]nimplemented!|[t]odo!\(|[N]otImplementedError")


def tracked(*patterns: str) -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


CODE = tracked("*.rs", "*.py", "*.proto")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_code_is_finished_ascii_and_short(path: Path) -> None:
    text = path.read_text()
    assert text.isascii(), "only ASCII in code"
    assert "\t" not in text, "no tabs"
    assert not UNFINISHED.search(text), "unfinished mark"
    columns_max = COLUMNS_MAX if path.suffix != ".proto" else 140
    wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > columns_max]
    assert not wide, f"lines over {columns_max} columns: {wide}"
    test = {"tests", "bench", "fuzz"} & set(path.relative_to(ROOT).parts) or "test" in path.stem
    if not test:
        lines = len(text.split("#[cfg(test)]")[0].splitlines())
        assert lines <= LINES_MAX, f"{lines} lines of production code; find the seam that splits it"


@pytest.mark.parametrize("path", tracked("*.md"), ids=name_of)
def test_links_of_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (path.parent / target).exists(), target


def test_changelog_keeps_its_format() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
