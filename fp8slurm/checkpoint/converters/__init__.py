"""From one format to another: planned, streamed, verified, resumable."""
