"""Stubs generated from proto/ by proto/generate.py. Committed, never edited."""
