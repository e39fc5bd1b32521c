"""The golden bytes' file: a JSON header and a payload, xz-compressed.

{"version": ..., "records": [case + {"refused": text} or {"codes": bytes or a SHA-256, "scales": bytes}]}; the payload
holds, for each record in order, the codes (unless hashed) and the fp32 scales.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

LONGEST_CODES = 2304
"""Longer codes are kept as a SHA-256."""


def pack_record(record: dict[str, Any], codes: bytes, scales: bytes) -> tuple[dict[str, Any], bytes]:
    """(header entry, payload) of a result."""
    if len(codes) > LONGEST_CODES:
        return record | {"sha256": hashlib.sha256(codes).hexdigest(), "scales": len(scales)}, scales
    return record | {"codes": len(codes), "scales": len(scales)}, codes + scales


def write(path: Path, versions: dict[str, str], records: list[tuple[dict[str, Any], bytes]]) -> None:
    """Write the file."""
    header = json.dumps({"versions": versions, "records": [r for r, _ in records]}, separators=(",", ":")).encode()
    payload = b"".join(p for _, p in records)
    path.write_bytes(lzma.compress(len(header).to_bytes(8, "little") + header + payload, preset=9))


def read(path: Path) -> tuple[dict[str, str], list[tuple[dict[str, Any], bytes | None, bytes]]]:
    """(versions, [(header entry, codes or None where hashed, scales)]); refused cases have empty bytes."""
    raw = lzma.decompress(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    at, found = 8 + length, []
    for record in header["records"]:
        codes: bytes | None = None
        if "codes" in record:
            codes = raw[at : at + record["codes"]]
            at += record["codes"]
        scales = raw[at : at + record.get("scales", 0)]
        at += record.get("scales", 0)
        found.append((record, codes, scales))
    assert at == len(raw), "trailing bytes"
    return header["versions"], found
