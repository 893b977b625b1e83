"""Photos: from files to batches."""
