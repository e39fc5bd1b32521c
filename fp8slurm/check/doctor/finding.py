"""What a check says, and how the same words of several nodes become one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One line."""

    check: str
    """What was looked at: python, packages, gpu, memory, shm, limits, files, paths, network, bandwidth, slurm."""
    level: Level
    text: str
    fix: str = ""
    """What to do about it; empty for ok."""
    node: str = ""
    """Nodes that say so, with commas; empty: this machine, or the cluster as a whole."""

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Finding:
        return cls(**{k: values[k] for k in ("check", "level", "text", "fix", "node")})


@dataclass(frozen=True)
class Check:
    """Makes the findings of one check."""

    name: str

    def ok(self, text: str) -> Finding:
        return Finding(self.name, "ok", text)

    def warning(self, text: str, fix: str = "", node: str = "") -> Finding:
        return Finding(self.name, "warning", text, fix, node)

    def error(self, text: str, fix: str = "", node: str = "") -> Finding:
        return Finding(self.name, "error", text, fix, node)


def merge(findings: Iterable[Finding], nodes: int) -> list[Finding]:
    """Equal findings of several nodes as one, those of all `nodes` without their names; order of appearance kept."""
    names: dict[Finding, list[str]] = {}
    for finding in findings:
        who = names.setdefault(replace(finding, node=""), [])
        if finding.node and finding.node not in who:
            who.append(finding.node)
    return [replace(f, node="" if len(who) == nodes > 1 else ",".join(who)) for f, who in names.items()]


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level; ok if there is no finding."""
    return max((f.level for f in findings), key=LEVELS.index, default="ok")
