"""Rows of prompts and examples, made into tokens. Runs in both kinds of tasks, and before a job is queued."""

SUFFIXES = (".jsonl", ".parquet")
"""Of data files. Here, without torch: a task reads it before its environment is set."""
