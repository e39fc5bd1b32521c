"""Rows of prompts and examples, made into tokens. Runs in both kinds of tasks, and before a job is queued."""
