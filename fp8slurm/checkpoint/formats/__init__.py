"""Checkpoints as they lie on disk: safetensors, torch_dist, their names."""
