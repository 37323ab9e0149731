"""Metrics of answers, captions, images and texts, and the Fusion Brain Challenge scores."""
