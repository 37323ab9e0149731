"""Vision encoders: CLIP, ConvNeXt, ViT, patches and VQ-GAN features, alone or merged."""
