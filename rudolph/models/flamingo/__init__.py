"""Flamingo: a language model with gated cross-attention to images and videos."""
