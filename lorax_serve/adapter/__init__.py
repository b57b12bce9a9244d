"""The adapter leaf: PEFT's LoRA format, read, checked and written.

Shared by the server and the trainer; it knows neither of them, nor any model code.
"""

from lorax_serve.adapter.compose import compose
from lorax_serve.adapter.config import LoRAConfig
from lorax_serve.adapter.files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    read,
    save,
    undo_broken_save,
)
from lorax_serve.adapter.match import Match, match_tensors, match_weights
from lorax_serve.adapter.modules import ModuleKind, ModuleShape
from lorax_serve.adapter.report import inspect, refusal, report_of
from lorax_serve.adapter.targets import select_targets
from lorax_serve.adapter.tensors import Role, tensor_name
from lorax_serve.adapter.weights import LoRAPair, LoRAWeights, TokenRows

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "AdapterFiles",
    "LoRAConfig",
    "LoRAPair",
    "LoRAWeights",
    "Match",
    "ModuleKind",
    "ModuleShape",
    "Role",
    "TokenRows",
    "compose",
    "inspect",
    "match_tensors",
    "match_weights",
    "read",
    "refusal",
    "report_of",
    "save",
    "select_targets",
    "tensor_name",
    "undo_broken_save",
]
