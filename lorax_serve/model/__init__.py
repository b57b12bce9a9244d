"""The base model on a device, run with unmerged LoRA. Knows no requests and no network."""
