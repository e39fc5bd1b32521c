"""Evaluations: tasks, questions, answers, figures. Runs on a login node or in a job of its own; the rollout worker uses its parts."""
