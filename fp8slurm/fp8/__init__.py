"""Block FP8: the format, what is quantized, the quantizers. Imports nothing of ours. Runs everywhere."""
