"""The VQ-GAN family: encoder, decoder and quantizers of the image tokenizer."""
