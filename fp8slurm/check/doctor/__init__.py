"""What can be wrong with a machine or a cluster before anything has run on it; `fp8slurm doctor`."""
