"""Which errors are the user's: shown as one line, and what they mean for a running job.

A task that ends with an error is started again, as long as the run makes progress
(slurm.max_attempts_without_progress), unless the error says `permanent = True`. Everything that is not declared here is
foreign: a ValueError of json, numpy or torch may come from one torn read of a shared file system, so it costs a
requeue, and is recorded with its traceback.
"""

from __future__ import annotations

LONGEST_LINE = 1000
"""Characters of one line of a message."""
MOST_LINES = 40


class InputError(ValueError):
    """What the user has to change; the message names the value, what is allowed and the flag.

    Shown without a traceback; no other attempt is made, for it would only meet the same. What a message quotes of a
    damaged or hostile file may be of any length: the middle of a long line is left out.
    """

    permanent = True

    def __init__(self, message: str = "") -> None:
        super().__init__(bounded(message))


class TransientInputError(InputError):
    """Something the user named cannot be used as it was found now: a file that is damaged, torn or away, weights that
    are not finite. The message says all, but another attempt may find it whole."""

    permanent = False


class BadCheckpoint(TransientInputError):
    """A checkpoint on disk is damaged or contradicts itself; the message names the file and what is wrong with it."""


def bounded(text: str) -> str:
    """A message of at most MOST_LINES lines of LONGEST_LINE characters; its lines begin and end as they did."""
    lines = text.split("\n", MOST_LINES)
    if len(lines) > MOST_LINES:
        lines[-1] = f"... ({lines[-1].count(chr(10)) + 1} more lines)"
    return "\n".join(map(_shortened, lines))


def _shortened(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    left_out = f" ... ({len(line)} characters) ... "
    kept = LONGEST_LINE - len(left_out)
    return line[: kept - kept // 3] + left_out + line[-(kept // 3) :]
