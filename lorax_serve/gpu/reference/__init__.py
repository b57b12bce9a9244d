"""The calls of ``gpu.ops`` in plain torch, as they are written there."""
