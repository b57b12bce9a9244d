"""Ways to damage an adapter's directory."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorax_serve.adapter import CONFIG_FILE, WEIGHTS_FILE
from tests.fidelity.variants import everywhere

__all__ = ["MUTATIONS", "VARIANTS"]

VARIANTS = (
    everywhere(
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"down_proj": 3},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 31},
    ),
    everywhere(r=2, use_dora=True, use_rslora=True),
    everywhere(r=2, modules_to_save=["norm"], lora_bias=True),
    everywhere(r=1, trainable_token_indices=[3, 9, 77], exclude_modules=["up_proj"]),
)
Mutation = Callable[[random.Random, Path], None]


def file_of(rng: random.Random, directory: Path) -> Path:
    return directory / rng.choice((CONFIG_FILE, WEIGHTS_FILE))


def flip_bits(rng: random.Random, directory: Path) -> None:
    path = file_of(rng, directory)
    data = bytearray(path.read_bytes())
    # In the header of the weights half of the time, since it is small.
    end = len(data) if rng.random() < 0.5 else min(len(data), 4000)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(rng: random.Random, directory: Path) -> None:
    path = file_of(rng, directory)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] + bytes(rng.choice((0, 0, 9))))


def split(directory: Path) -> tuple[dict[str, Any], bytes]:
    data = (directory / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(directory: Path, header: bytes, data: bytes, size: int | None = None) -> None:
    length = len(header) if size is None else size
    (directory / WEIGHTS_FILE).write_bytes(length.to_bytes(8, "little") + header + data)


def header_bomb(rng: random.Random, directory: Path) -> None:
    header, data = split(directory)
    text, size = json.dumps(header).encode(), None
    match rng.randrange(4):
        case 0:
            size = rng.choice((0, 1, len(text) + 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1))
        case 1:
            text = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
        case 2:
            text = b"[" * 100_000
        case 3:
            name = rng.choice([*header])
            first = json.dumps({name: header[name]}).encode()
            text = first[:-1] + b"," + text[1:]  # the same key twice
    join(directory, text, data, size)


def odd_entry(rng: random.Random, directory: Path) -> None:
    header, data = split(directory)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    odd: tuple[Any, ...] = (-1, 0, 1, 7, 1 << 31, 1 << 62, 1 << 64, 1e300, "3", None, [], 2.5)
    match rng.randrange(4):
        case 0:
            entry["shape"] = [rng.choice(odd) for _ in range(rng.randint(0, 3))]
        case 1:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(odd)
        case 2:
            entry["dtype"] = rng.choice(("F64", "F16", "I32", "BOOL", "F8_E4M3", "C64", "X", None))
        case 3:
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(([end, begin], [begin - 4, end], [begin, end + 4]))
    join(directory, json.dumps(header).encode(), data)


def change_tensor(rng: random.Random, directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    match rng.randrange(7):
        case 0:
            dtypes = (torch.float64, torch.int32, torch.bool, torch.float16, torch.bfloat16)
            tensors[name] = tensor.to(rng.choice(dtypes))
        case 1:
            tensors[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[:-1].clone()
        case 2:
            tensors[name] = torch.cat([tensor, tensor], dim=rng.randrange(tensor.ndim))
        case 3:
            odd = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))
            tensor.view(-1)[rng.randrange(tensor.numel())] = odd
        case 4:
            tensors[name] = tensor[None] if rng.random() < 0.5 else tensor.flatten()
        case 5:
            tensors[name] = torch.zeros(0)
        case 6:
            tensors[name] = torch.randn(tensor.shape)
    save_file(tensors, directory / WEIGHTS_FILE)


def rename_tensor(rng: random.Random, directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    old = rng.choice(sorted(tensors))
    tensor = tensors.pop(old)
    new = rng.choice(
        (
            old.replace("lora_A", "lora_B"),
            old.replace(".weight", ".default.weight"),
            old.replace("layers.0", "layers.9"),
            old.removeprefix("base_model.model."),
            f"base_model.model.{old}",
            "../../../etc/passwd",
            f"../{old}",
            f"/{old}",
            old.replace(".", "/"),
            f"{old}\0",
            f" {old}",
            old.upper(),
            "",
            "ä" * 1000,
        )
    )
    tensors[new] = tensor
    if rng.random() < 0.3:
        tensors[old] = tensor.clone()
    save_file(tensors, directory / WEIGHTS_FILE)


def odd_file(rng: random.Random, directory: Path) -> None:
    path = file_of(rng, directory)
    kept = directory / "kept"
    path.rename(kept)
    match rng.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(kept)
        case 3:
            path.symlink_to(path)
        case 4:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem")))
        case 5:
            path.symlink_to("/etc/passwd")
        case 6:
            path.symlink_to(rng.choice((directory / "none", directory)))


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 16, -1, 2.5, 1 << 70, 10**300, 1e308, 1e-320, float("nan"),
    float("inf"), "", "x", "q_proj", "all-linear", "all", "lora_only", "../..", "\0", [], {}, [[]],
    ["q_proj"], ["q_proj", 3], ["norm"], ["lm_head"], [0], [1], [10**30], {"q_proj": 2},
    {"q_proj": "2"}, {"": 1}, {"x": {"y": []}},
)  # fmt: skip
BLOW_UP = (
    "(a+)+$", "(.*)*x", "(.*a){20}", ".*" * 12 + "!", "(a|a)*b", r"(\w+\s?)*\.", "(" * 5000,
    "a{1,60000}{1,60000}", "(.?){40}.{40}", r"(.*)\1\1\1x", "(?=(.*)+)x", "x" * 100_000, "[", "\\",
    r"(.*\.)?(([a-z_0-9.]+)+)+!", "(?R)", "(?P<index>.)", "){}(", "{", "{0}", "{index}",
)  # fmt: skip


def change_config(rng: random.Random, directory: Path) -> None:
    raw = json.loads((directory / CONFIG_FILE).read_text())
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*raw, "surprise", "layers_pattern"])
        match rng.randrange(4):
            case 0:
                raw.pop(key, None)
            case 1:
                raw[rng.choice(("surprise", f"{key}_", "__class__"))] = rng.choice(VALUES)
            case _:
                raw[key] = rng.choice(VALUES)
    (directory / CONFIG_FILE).write_text(json.dumps(raw))


def blow_up(rng: random.Random, directory: Path) -> None:
    raw = json.loads((directory / CONFIG_FILE).read_text())
    expression = rng.choice(BLOW_UP)
    match rng.randrange(5):
        case 0:
            raw[rng.choice(("target_modules", "exclude_modules"))] = expression
        case 1:
            raw["rank_pattern"] = {expression: 2}
        case 2:
            raw["alpha_pattern"] = {f"{expression}{i}": 2 for i in range(rng.choice((1, 3000)))}
        case 3:
            raw["modules_to_save"] = [expression]
        case 4:
            raw |= {"layers_pattern": [expression], "layers_to_transform": [0]}
    (directory / CONFIG_FILE).write_text(json.dumps(raw))


def odd_json(rng: random.Random, directory: Path) -> None:
    path = directory / CONFIG_FILE
    text = path.read_text()
    path.write_text(
        rng.choice(
            (
                "[" * 100_000,
                '{"a":' * 100_000,
                text.replace("{", '{"r": 3,', 1),
                text.rstrip()[:-1] + ', "r": 3}',
                text.rstrip()[:-1] + ', "r": ' + "9" * 5000 + "}",
                "\ufeff" + text,
                text + text,
                "null",
                "[]",
                text.replace("LORA", r"\ud800"),
            )
        )
    )


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    truncate,
    header_bomb,
    odd_entry,
    change_tensor,
    rename_tensor,
    odd_file,
    change_config,
    blow_up,
    odd_json,
)
