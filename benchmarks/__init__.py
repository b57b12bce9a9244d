"""Measurements: seeded, JSON out, medians. Nothing here is a test."""
