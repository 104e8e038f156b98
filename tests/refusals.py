"""Errors that a test expects by their code: some causes share a class."""

from __future__ import annotations

from typing import Any

import pytest

from tink_rl import errors


def code_of(kind: str | type[errors.TinkError]) -> str:
    """`kind`, or the code of that class."""
    return kind if isinstance(kind, str) else kind.code


def status_of(kind: str | type[errors.TinkError]) -> int:
    """The HTTP status of an error of this code."""
    cls = errors.by_code()[code_of(kind)]
    return cls.codes.get(code_of(kind), cls.status)


def refused(kind: str | type[errors.TinkError], *, match: str | None = None) -> Any:
    """`pytest.raises` for an error of exactly this code, and of the class that carries it."""
    code = code_of(kind)
    return pytest.raises(
        errors.by_code()[code], match=match, check=lambda error: error.code == code
    )
