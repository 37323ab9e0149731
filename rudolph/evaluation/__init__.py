"""Evaluation of trained models: evaluators, metrics and statistics."""
