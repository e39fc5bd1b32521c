"""Errors of this room."""

from __future__ import annotations


class BadCheckpoint(ValueError):
    """A checkpoint on disk is damaged or contradicts itself; the message names the file and what is wrong with it."""
