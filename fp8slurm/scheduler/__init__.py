"""What is asked of Slurm, and what it answers: sbatch, scontrol, squeue, sacct. Runs anywhere Slurm's commands are."""
