"""The RUDOLPH family: masked decoder, static-shape decoding, scoring and weight adaptation."""
