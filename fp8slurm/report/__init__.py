"""What a run looks like: status in a terminal, one HTML file, Markdown. Runs on a login node."""
