"""Exit codes are a promise: every class has one, and the page says the same as the code."""

from __future__ import annotations

import re
from pathlib import Path

from ebbtide import errors
from ebbtide.errors import CODE_WORDS, KINDS, EbbError, ExitCode, InternalError, error_from

PAGE = Path(__file__).parents[2] / "docs/operating/exit-codes.md"


def test_numbers_are_what_scripts_rely_on() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "INTERNAL": 1,
        "USAGE": 2,
        "CONFIG": 3,
        "NOT_FOUND": 4,
        "REFUSED": 5,
        "UNREACHABLE": 6,
        "DAMAGED": 7,
        "NO_SPACE": 8,
        "PRIVILEGE": 9,
        "POINT": 10,
        "INTERRUPTED": 130,
        "CLOSED_PIPE": 141,
    }


def test_every_class_is_reachable_by_word_and_by_kind() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, EbbError) and value is not EbbError
    }
    assert set(CODE_WORDS.values()) == classes
    assert set(KINDS.values()) == classes
    assert all(CODE_WORDS[kind.default_code] is kind for kind in classes)


def test_error_from_another_process() -> None:
    error = error_from("in-use", "busy", "wait")
    assert error.as_dict() == {"code": "in-use", "message": "busy", "hint": "wait", "exit_code": 5}
    assert isinstance(error_from("some-new-word", "x"), InternalError)
    assert error_from("some-new-word", "x", kind=8).exit_code is ExitCode.NO_SPACE
    assert error_from("in-use", "x", kind=99).exit_code is ExitCode.REFUSED


def test_the_page_lists_every_code_and_word() -> None:
    rows = {}
    for line in PAGE.read_text().splitlines():
        if found := re.match(r"\| (\d+) \|([^|]+)\|([^|]*)\|$", line):
            rows[int(found[1])] = set(re.findall(r"`([a-z-]+)`", found[3]))
    assert set(rows) == {int(code) for code in ExitCode}
    for word, kind in CODE_WORDS.items():
        assert word in rows[int(kind.exit_code)], word
    assert sum(len(words) for words in rows.values()) == len(CODE_WORDS)
