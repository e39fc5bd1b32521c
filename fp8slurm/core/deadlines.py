"""How long before a job's end what has to be done; the check before a job is queued reads the same numbers."""

REQUEUE_S = 8.0
"""Seconds before the end at which the job is requeued, saved or not."""

SAFETY = 1.5
"""A save may take this many times as long as the last one."""

RENDEZVOUS_TIMEOUT_S = 600.0
