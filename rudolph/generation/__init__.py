"""Sampling, search, scoring and reranking with trained models; image prompts and upscaling."""
