"""The adapter leaf: PEFT's LoRA format, read, checked and written.

Shared by the server and the trainer; it knows neither of them, nor any model code.
"""

from lorax_serve.adapter.config import LoRAConfig
from lorax_serve.adapter.files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read, save
from lorax_serve.adapter.targets import LinearShape, select_targets
from lorax_serve.adapter.weights import LoRAPair, LoRAWeights, match_weights

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "AdapterFiles",
    "LinearShape",
    "LoRAConfig",
    "LoRAPair",
    "LoRAWeights",
    "match_weights",
    "read",
    "save",
    "select_targets",
]
