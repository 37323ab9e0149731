"""Datasets, one module or group of modules each."""
