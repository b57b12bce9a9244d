"""Runs that can go on: what is kept of them, and what makes two of them the same."""
