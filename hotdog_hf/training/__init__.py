"""Training: the job, the loop, the run on disk."""
