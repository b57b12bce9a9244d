"""Training: losses, gradients, steps, and what happens when memory is short."""
