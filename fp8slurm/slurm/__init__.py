"""A run as a Slurm job, or as processes here: submitted on a login node, started by srun, requeued when it ends before the run does."""
