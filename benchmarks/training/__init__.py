"""lorax-train beside PEFT with transformers' Trainer: ``python -m benchmarks.training``."""
