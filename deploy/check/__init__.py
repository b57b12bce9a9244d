"""Checks of what is in ``deploy`` that need no cluster: ``make deploy-check``."""
