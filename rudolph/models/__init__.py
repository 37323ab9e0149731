"""Models as plain ``nn.Module`` classes, with one folder per family."""
