"""Block FP8: the format, what is quantized, the quantizers. Imports nothing of ours. Runs everywhere."""

BLOCK = 128
"""Edge of a weight's block, and length of a group of activations. Here, because not all who need it may import torch."""
