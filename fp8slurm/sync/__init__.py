"""Weights from the trainer to the engines. Runs in training ranks (senders) and rollout workers (receivers)."""
