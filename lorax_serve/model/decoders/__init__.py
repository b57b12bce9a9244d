"""The base model with adapters, from token ids to logits, in three ways; and their caches."""
