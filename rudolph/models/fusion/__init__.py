"""Fusion of modalities: connectors, cross-attention, resampler and late fusion."""
