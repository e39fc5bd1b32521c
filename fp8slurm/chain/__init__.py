"""Convert, train, export and evaluate, each a command or all as one chain of Slurm jobs. Runs on a login node."""
