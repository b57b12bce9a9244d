"""The console programs ``lorax-serve`` and ``lorax``."""
