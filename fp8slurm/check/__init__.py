"""What cannot work is refused before it is queued. Runs on a login node, and once more where a job begins."""
