"""Training: data, losses, optimizers, checkpoints and logs, and the methods built on them."""
