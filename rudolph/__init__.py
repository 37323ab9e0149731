"""A laboratory for text-image-text transformers: sequence, models, training, sampling, results."""

__version__ = "0.1.0"
