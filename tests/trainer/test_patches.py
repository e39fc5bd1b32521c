"""What a training rank replaces in Megatron and torch, and the private names that it uses: docs/patches.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patch_list import check_replaced
from trainer_reference import write_model

pytestmark = pytest.mark.slow


def test_a_rank_replaces_what_the_page_lists(launch: Callable[..., Any], tmp_path: Path) -> None:
    """From its start to a resume from its first checkpoint; all private names are there."""
    replaced, missing = launch("patches", 1, ["replaced"], dense=write_model(tmp_path / "dense")).result("replaced")
    check_replaced("A training rank", replaced)
    assert missing == []
