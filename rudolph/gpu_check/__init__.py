"""Checks and speed measurements of the package on one GPU: ``make gpu-check``."""
