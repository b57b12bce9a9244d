"""From logits to tokens, on a CPU and on a GPU."""
