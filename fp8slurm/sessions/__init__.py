"""Conversations: what rollout.generate is handed, and how many of them go on at the same time."""
