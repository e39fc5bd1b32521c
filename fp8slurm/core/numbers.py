"""Numbers of records that anybody may have written."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float | None:
    """A finite number of a record, else None (NaN, infinity, text, bool, absent)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
