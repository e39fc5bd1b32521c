"""Agents: tools that run apart from the rollout worker, its OpenAI-compatible endpoint, environments of others."""
