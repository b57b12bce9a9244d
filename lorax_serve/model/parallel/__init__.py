"""One model on several devices, a process each: tensor parallelism (docs/adr/0006)."""
