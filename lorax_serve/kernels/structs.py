"""The structures that the C++ kernels read, as ctypes sees them: one to one with the headers."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_void_p

__all__ = [
    "MAX_PARTS",
    "AttentionArgs",
    "LinearArgs",
    "LoRAArgs",
    "LoRAPartArgs",
    "LoRASiteArgs",
    "PromptArgs",
    "RowsArgs",
    "SegmentArgs",
]

MAX_PARTS = 3


class LinearArgs(ctypes.Structure):
    """``struct Linear`` of linear.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("norm", c_void_p),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("eps", c_float),
    )


class LoRAPartArgs(ctypes.Structure):
    """``struct LoraPart``."""

    _fields_ = (
        ("b", c_void_p),
        ("first_rank", c_int32),
        ("ranks", c_int32),
        ("h_column", c_int32),
        ("first_panel", c_int32),
        ("panel_step", c_int32),
        ("panels", c_int32),
    )


class LoRASiteArgs(ctypes.Structure):
    """``struct LoraSite``; all zero where an adapter changes nothing."""

    _fields_ = (
        ("a", c_void_p),
        ("parts", LoRAPartArgs * MAX_PARTS),
        ("num_parts", c_int32),
        ("gain", c_void_p),
        ("shift", c_void_p),
        ("norm", c_void_p),
    )


class SegmentArgs(ctypes.Structure):
    """``struct Segment``: ascending row numbers, and the adapter's array of sites."""

    _fields_ = (("sites", c_void_p), ("rows", c_void_p), ("num_rows", c_int32))


class LoRAArgs(ctypes.Structure):
    """``struct Lora``."""

    _fields_ = (
        ("segments", POINTER(SegmentArgs)),
        ("num_segments", c_int32),
        ("h_width", c_int32),
        ("h", c_void_p),
    )


class AttentionArgs(ctypes.Structure):
    """``struct Attention`` of attention.h."""

    _fields_ = (
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("max_length", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    )


class PromptArgs(ctypes.Structure):
    """``struct Prompt``."""

    _fields_ = (("start", c_int32), ("end", c_int32))


class RowsArgs(ctypes.Structure):
    """``struct Rows``."""

    _fields_ = (
        ("kv_slot", c_void_p),
        ("position", c_void_p),
        ("prompts", POINTER(PromptArgs)),
        ("num_rows", c_int32),
        ("num_decodes", c_int32),
        ("num_prompts", c_int32),
        ("by_rows", c_int32),
    )
