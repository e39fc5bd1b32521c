"""What every room may use: errors, small files, processes, deadlines, and the types handed between processes."""
