"""What a Qwen3 is: sizes, names, layouts. Runs everywhere."""
