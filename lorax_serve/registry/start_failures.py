"""What could not be loaded when a server started that remembers nothing."""

from __future__ import annotations

from lorax_serve.errors import LoraxError
from lorax_serve.registry.events import RegistryListener
from lorax_serve.registry.version import Adapter

__all__ = ["StartFailures"]


class StartFailures(RegistryListener):
    """Forgets a failure when the adapter is loaded after all. Failures of calls are not among them:
    who has called was told.

    Attributes:
        by_name: why.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, LoraxError] = {}

    def loaded(self, adapter: Adapter) -> None:
        """See ``RegistryListener``."""
        self.by_name.pop(adapter.name, None)
