"""The GPU path on random weights of real shapes, beside its floors and its peers."""
