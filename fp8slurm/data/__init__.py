"""Rows of prompts and examples, made into tokens. Runs in training ranks, in rollout workers, and before a job is queued."""
