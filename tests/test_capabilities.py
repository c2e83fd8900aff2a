"""docs/capabilities.md says what is so."""

from __future__ import annotations

import pytest


def test_the_table_is_up_to_date() -> None:
    for package in ("ml_dtypes", "torch", "jax", "array_api_strict"):
        pytest.importorskip(package)
    from tools import make_capabilities

    written = make_capabilities.PATH.read_text(encoding="utf-8")
    assert written == make_capabilities.text(), "run python -m tools.make_capabilities"
