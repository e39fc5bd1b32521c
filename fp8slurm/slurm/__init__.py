"""A run as a Slurm job, or as processes here: submitted, started by srun, requeued until the run is finished."""
