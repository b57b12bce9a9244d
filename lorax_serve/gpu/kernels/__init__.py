"""The calls of ``gpu.ops`` as Triton kernels; they import triton."""
