"""Datasets of image-text pairs, their splits, and training batches."""
