"""The audit of photos before any training."""
