"""Evaluations: tasks, questions, answers, figures. Runs anywhere; the rollout worker uses its parts."""
