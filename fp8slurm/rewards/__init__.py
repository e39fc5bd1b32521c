"""Rewards: a pool of processes, and the graders that run in them. Runs in the rollout worker and its children."""
