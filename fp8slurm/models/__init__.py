"""What a model is: its family, sizes, names, layouts. Runs everywhere."""
