"""The base model: found, loaded, and run with unmerged LoRA. Knows no requests and no network."""
