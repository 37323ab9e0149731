"""Stages of a training run."""
