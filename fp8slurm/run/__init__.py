"""A run's folder: what attempts and checkpoints write there, and what anybody reads there. Runs in training ranks (rank
0 writes) and on login nodes."""
