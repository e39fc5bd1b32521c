"""Which errors are the user's: shown as one line, and what they mean for a running job.

A task that ends with an error is started again, as long as the run makes progress
(slurm.max_attempts_without_progress), unless the error says `permanent = True`. Everything that is not declared here is
foreign: a ValueError of json, numpy or torch may come from one torn read of a shared file system, so it costs a
requeue, and is recorded with its traceback.
"""

from __future__ import annotations


class InputError(ValueError):
    """What the user has to change; the message names the value, what is allowed and the flag.

    Shown without a traceback; no other attempt is made, for it would only meet the same.
    """

    permanent = True


class TransientInputError(InputError):
    """Something the user named cannot be used as it was found now: a file that is damaged, torn or away, weights that
    are not finite. The message says all, but another attempt may find it whole."""

    permanent = False


class BadCheckpoint(TransientInputError):
    """A checkpoint on disk is damaged or contradicts itself; the message names the file and what is wrong with it."""
