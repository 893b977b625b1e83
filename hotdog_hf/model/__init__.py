"""A network: its source, its output layer, saved, predicting."""
