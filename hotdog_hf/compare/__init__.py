"""Trained runs compared with each other."""
