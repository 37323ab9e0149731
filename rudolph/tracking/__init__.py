"""Tracking of runs: the event log in a run's folder, and MLflow."""
