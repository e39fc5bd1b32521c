"""What every room may use: errors, small files, processes, deadlines, and the types that are handed from one process to the next."""
