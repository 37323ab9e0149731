"""Decoder-only language models and greedy decoding."""
