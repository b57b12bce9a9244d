"""Every variant of LoRA that PEFT writes, served in one mixed batch, against PEFT alone."""
