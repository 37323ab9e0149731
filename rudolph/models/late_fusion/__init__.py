"""Late fusion of an image encoder and a text encoder into a classifier of answers."""
