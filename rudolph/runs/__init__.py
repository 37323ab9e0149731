"""Execution of runs: hardware, stages, many runs, search and weight sources."""
