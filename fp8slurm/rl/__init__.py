"""The loop: advantages, packing, loss, steps. Runs in training ranks."""
