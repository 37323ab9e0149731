"""Lightning modules, losses, optimizers, callbacks and resume checkpoints."""
