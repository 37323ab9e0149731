"""Vision-language encoders: CLIP."""
