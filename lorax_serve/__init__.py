"""Serve one frozen base model with many LoRA adapters. See docs/architecture.md for the map."""

from lorax_serve._version import __version__

__all__ = ["__version__"]
