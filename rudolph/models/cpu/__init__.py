"""Fast CPU inference: tiled convolutions, channels-last group norm, int8 and prepacked weights."""
