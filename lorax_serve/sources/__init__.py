"""Where adapters come from: directories, S3 buckets, the Hugging Face Hub.

It knows URIs, files and sizes. It knows nothing of what is in the files, of adapters' names, or of
asyncio: calls block, and may come from any thread.
"""

from lorax_serve.sources.opening import open_object, open_source
from lorax_serve.sources.source import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    FetchLimits,
    Source,
    WatchableSource,
)

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "FetchLimits",
    "Source",
    "WatchableSource",
    "open_object",
    "open_source",
]
