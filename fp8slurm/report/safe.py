"""Untrusted text and numbers made fit to show: nothing hidden, nothing that a terminal or a browser would obey."""

from __future__ import annotations

import unicodedata
from datetime import datetime
from typing import Any

DASH = "\u2013"
"""Where there is no value."""
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_JOINERS = frozenset("\u200b\u200c\u200d\u2060\ufeff\u2028\u2029")


def visible(text: Any) -> str:
    """Text in which control, bidirectional and zero-width characters are shown by name; line breaks and tabs stay.

    Half surrogates, which no file can hold, become U+FFFD.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    out = []
    for c in text:
        code = ord(c)
        if c in "\n\t" or (32 <= code < 127):
            out.append(c)
        elif code < 32:
            out.append(chr(0x2400 + code))
        elif code == 127:
            out.append("\u2421")
        elif 0xD800 <= code <= 0xDFFF:
            out.append("\ufffd")
        elif c in _BIDI or c in _JOINERS or unicodedata.category(c) in ("Cc", "Cf"):
            out.append(f"\u27e8U+{code:04X}\u27e9")
        else:
            out.append(c)
    return "".join(out)


def one_line(text: Any, limit: int = 200) -> str:
    """`visible`, on one line, cut at `limit` characters."""
    line = " ".join(visible(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "\u2026"


def gist(text: str) -> str:
    """An error on one line: of a traceback the task and the last line, which says what happened."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        lines = [f"{lines[0].partition(':')[0]}: {lines[-1].strip()}"]
    return one_line("".join(lines), 160)


def when(at: float | None) -> str:
    """Local time, to the second."""
    return DASH if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def figure(value: float | None, signed: bool = False) -> str:
    """A number for people: three or four significant digits, powers of ten outside 0.001 to 1,000,000."""
    if value is None:
        return DASH
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{size:.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 1000:
        text = f"{size:,.0f}"
    elif size >= 100:
        text = f"{size:.1f}".removesuffix(".0")
    elif float(size).is_integer():
        text = f"{size:.0f}"
    elif size >= 10:
        text = f"{size:.2f}"
    else:
        text = f"{size:.3f}" if size >= 0.1 else f"{size:.3g}"
    sign = "\u2212" if value < 0 else "+" if signed and value > 0 else ""
    return sign + text


def seconds(value: float | None) -> str:
    """A duration: 0.32 s, 12.3 s, 4 min 05 s, 3 h 20 min."""
    if value is None:
        return DASH
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    if value < 3600:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(value / 60), 60)
    return f"{hours:,} h {rest:02d} min"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
