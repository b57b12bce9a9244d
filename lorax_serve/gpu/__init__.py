"""What the GPU's decoder computes with: Triton kernels, and the same in plain torch."""
