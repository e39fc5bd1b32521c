"""Stopping before the end: what the loop asks at step boundaries. Others know who gives notice, and what follows."""

from __future__ import annotations

from typing import Protocol


class StopPolicy(Protocol):
    """One for each rank; the ranks agree through the store on what rank 0 is told."""

    def noticed(self) -> bool:
        """Whether this rank was told to stop."""

    def at_step_boundary(self, noticed: bool, step_s: float, save_s: float) -> str:
        """Rank 0, between two steps: why to stop here, or "". `noticed`: some rank was told to; seconds that a step and
        a save take."""

    def in_rollout(self, save_s: float) -> str:
        """Rank 0, while the engines generate: why to abandon this step, or ""."""

    def stopped(self, where: str, saved: bool) -> None:
        """Rank 0, everything saved: see to it that the run goes on."""


class StopRequested(Exception):
    """All ranks agreed to stop; the message says why."""


class StepAbandoned(StopRequested):
    """A step was given up in its rollout: the weights are still those of the boundary before it."""


class NeverStop:
    """No notice is ever given."""

    def noticed(self) -> bool:
        return False

    def at_step_boundary(self, noticed: bool, step_s: float, save_s: float) -> str:
        return ""

    def in_rollout(self, save_s: float) -> str:
        return ""

    def stopped(self, where: str, saved: bool) -> None:
        raise AssertionError("no stop was requested")
