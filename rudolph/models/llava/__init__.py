"""LLaVA: a language model that reads image vectors among its word embeddings."""
