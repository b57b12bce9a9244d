"""Real servers, as in the end-to-end tests."""

from __future__ import annotations

from tests.e2e.conftest import start_server, tiny_model

__all__ = ["start_server", "tiny_model"]
