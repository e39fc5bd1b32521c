"""Block FP8: the format, what is quantized, the quantizers. Imports nothing of ours. Runs everywhere."""

BLOCK = 128
"""Edge of a weight's block, length of a group of activations. Here, for those too that may not import torch."""
