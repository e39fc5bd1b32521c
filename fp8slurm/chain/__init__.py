"""Convert, train, export and evaluate as one chain of Slurm jobs. Runs on a login node."""
