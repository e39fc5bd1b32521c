"""Megatron-core: a training rank's model, optimizer, steps and checkpoints. Runs in training ranks."""
