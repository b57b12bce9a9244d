"""Rows: files to tokens, tokens to batches. Knows no model."""
