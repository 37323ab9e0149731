"""Evaluators: functions that score a trained model on a split."""
