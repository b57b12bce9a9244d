"""``lorax-train import``: the Elixir library's files, and whatever may stand in their place."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax_serve.adapter import match_weights, read
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.errors import TrainingError
from lorax_train.cli import main
from lorax_train.elixir import nx
from lorax_train.elixir.etf import Atom, read_term
from lorax_train.elixir.nx import read_layers
from lorax_train.model.base import load_model

FullDisk = Callable[[], AbstractContextManager[None]]

Capture = pytest.CaptureFixture[str]
Layers = dict[str, dict[str, torch.Tensor]]
ORDER = ("key", "value", "query")
HIDDEN, RANK, BLOCKS = 48, 2, 2


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


def etf(term: Any) -> bytes:
    """Erlang's term_to_binary, without the version."""
    match term:
        case Atom():
            return bytes([119, len(term)]) + term.encode()
        case bool() | None:
            raise TypeError(term)
        case int() if 0 <= term < 256:
            return bytes([97, term])
        case int() if -(1 << 31) <= term < 1 << 31:
            return b"\x62" + term.to_bytes(4, "big", signed=True)
        case int():
            raw = abs(term).to_bytes((term.bit_length() + 7) // 8, "little")
            return bytes([110, len(raw), term < 0]) + raw
        case float():
            return b"\x46" + struct.pack(">d", term)
        case str() | bytes():
            raw = term.encode() if isinstance(term, str) else term
            return b"\x6d" + len(raw).to_bytes(4, "big") + raw
        case tuple():
            return bytes([104, len(term)]) + b"".join(map(etf, term))
        case list() if not term:
            return b"\x6a"
        case list():
            return b"\x6c" + len(term).to_bytes(4, "big") + b"".join(map(etf, term)) + b"\x6a"
        case dict():
            pairs = b"".join(etf(k) + etf(v) for k, v in term.items())
            return b"\x74" + len(term).to_bytes(4, "big") + pairs
    raise TypeError(term)


def serialized(layers: Layers, big: bool = False) -> bytes:
    """Nx.serialize."""
    buffers = b""

    def tensor(value: torch.Tensor) -> Any:
        nonlocal buffers
        kind = {torch.float32: ("f", 32), torch.bfloat16: ("bf", 16), torch.uint32: ("u", 32)}
        letter, bits = kind[value.dtype]
        raw = value.contiguous().view(torch.uint8).view(-1, bits // 8)
        data = bytes((raw.flip(1) if big else raw).flatten().tolist())
        names = [Atom("nil")] * value.ndim
        place = (len(buffers), len(data))
        buffers += data
        return (Atom("t"), tuple(value.shape), (Atom(letter), bits), names, [], *place)

    def container(pairs: Sequence[tuple[str, Any]]) -> Any:
        return (Atom("Elixir.Nx.Container.Map"), list(pairs), Atom("ok"))

    term = container(
        [
            (name, container([(k, tensor(t)) for k, t in each.items()]))
            for name, each in layers.items()
        ]
    )
    body = b"\x83" + etf(term)
    return b"nx" + bytes([1, big]) + len(body).to_bytes(8, "big") + body + buffers


def term_to_binary(layers: Layers, compressed: bool = False) -> bytes:
    """:erlang.term_to_binary of the parameters, as they are in memory."""

    def tensor(value: torch.Tensor) -> Any:
        state = bytes(value.contiguous().view(torch.uint8).flatten().tolist())
        backend = {Atom("__struct__"): Atom("Elixir.Nx.BinaryBackend"), Atom("state"): state}
        return {
            Atom("__struct__"): Atom("Elixir.Nx.Tensor"),
            Atom("data"): backend,
            Atom("shape"): tuple(value.shape),
            Atom("type"): (Atom("f"), 32),
            Atom("names"): [Atom("nil")] * value.ndim,
        }

    body = etf({name: {k: tensor(t) for k, t in each.items()} for name, each in layers.items()})
    if compressed:
        body = b"\x50" + len(body).to_bytes(4, "big") + zlib.compress(body)
    return b"\x83" + body


def pair(seed: int, rank: int = RANK, width: int = HIDDEN) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, width, generator=generator)
    return {"lora_a": a, "lora_b": torch.randn(width, rank, generator=generator)}


def numbered(count: int = 3 * BLOCKS) -> Layers:
    dropout = {"key": torch.tensor([1, 2], dtype=torch.uint32)}
    return {"dropout_0": dropout} | {f"lora_{i}": pair(i) for i in reversed(range(count))}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(data: bytes) -> Path:
        path = tmp_path / "params.lorax"
        path.write_bytes(data)
        return path

    return make


def imported(file: Path, model: Path, out: Path, *flags: str) -> list[str]:
    return ["import", str(file), "--model", str(model), "--out", str(out), "--alpha", "5", *flags]


def deltas(out: Path, model: Path) -> dict[str, torch.Tensor]:
    """What our reader makes of the adapter: scale * B @ A by module."""
    files = read(out)
    weights = match_weights(files.config, files.tensors, read_spec(model).modules())
    return {path: each.scale * each.b @ each.a for path, each in weights.pairs.items()}


def wanted(places: dict[tuple[int, str], dict[str, torch.Tensor]], block: int) -> torch.Tensor:
    """The ancestor's change of q, k and v, below each other."""
    rows = []
    for name in ("query", "key", "value"):
        each = places.get((block, name))
        zero = torch.zeros(HIDDEN, HIDDEN)
        rows.append(zero if each is None else 5 / RANK * each["lora_b"] @ each["lora_a"])
    return torch.cat(rows)


@pytest.mark.parametrize(
    "form",
    [
        serialized,
        lambda layers: serialized(layers, big=True),
        lambda layers: term_to_binary({k: v for k, v in layers.items() if k != "dropout_0"}),
        lambda layers: term_to_binary(
            {k: v for k, v in layers.items() if k != "dropout_0"}, compressed=True
        ),
    ],
    ids=["Nx.serialize", "big-endian", "term_to_binary", "compressed"],
)
def test_query_key_and_value_become_the_fused_pair(
    form: Callable[[Layers], bytes],
    write: Callable[[bytes], Path],
    tiny_gpt2: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    layers, out = numbered(), tmp_path / "out"
    assert main(imported(write(form(layers)), tiny_gpt2, out, "--r", "2")) == 0
    places = {(i // 3, ORDER[i % 3]): layers[f"lora_{i}"] for i in range(6)}
    found = deltas(out, tiny_gpt2)
    assert list(found) == [f"transformer.h.{i}.attn.c_attn" for i in range(BLOCKS)]
    for block, path in enumerate(found):
        torch.testing.assert_close(found[path], wanted(places, block), atol=1e-5, rtol=0)
    config = read(out).config
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (6, 15, True)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "read     LoRA of rank 2 on query, key, value of 2 blocks; scale 2.5"
    assert said[1] == f"written  {out}: 2 modules (c_attn), r 6, alpha 15, scale 2.5"
    assert said[2].startswith("order    the file numbers its layers; taken as key, value, query")


def test_the_adapter_computes_what_the_separate_layers_did(
    write: Callable[[bytes], Path], tiny_gpt2: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    layers, out = numbered(), tmp_path / "out"
    for each in layers.values():
        for name in each.keys() & {"lora_a", "lora_b"}:
            each[name] *= 0.1
    assert main(imported(write(serialized(layers)), tiny_gpt2, out)) == 0
    tokens = torch.arange(5, 25)[None]
    cpu = torch.device("cpu")
    with torch.no_grad():
        peft = PeftModel.from_pretrained(load_model("tiny", tiny_gpt2, torch.float32, cpu), out)
        ours = peft.eval()(input_ids=tokens).logits
        base: Any = load_model("tiny", tiny_gpt2, torch.float32, cpu)
        before = base(input_ids=tokens).logits
        for i, block in enumerate(base.transformer.h):

            def change(_: Any, args: Any, y: torch.Tensor, at: int = 3 * i) -> torch.Tensor:
                parts = []
                for name in ("query", "key", "value"):  # as Axon computes it
                    each = layers[f"lora_{at + ORDER.index(name)}"]
                    parts.append(args[0] @ each["lora_a"].T @ each["lora_b"].T * (5 / RANK))
                return y + torch.cat(parts, -1)

            block.attn.c_attn.register_forward_hook(change)
        theirs = base(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - before).abs().max() > 0.1


def test_layers_that_are_named_need_no_order(
    write: Callable[[bytes], Path], tiny_gpt2: Path, tmp_path: Path, capsys: Capture
) -> None:
    places = {
        (block, name): pair(10 * block + i)
        for block in range(BLOCKS)
        for i, name in enumerate(("value", "query"))
    }
    layers = {
        f"lora_decoder.blocks.{block}.self_attention.{name}": {
            "lora_down": each["lora_a"],
            "lora_up": each["lora_b"],
        }
        for (block, name), each in places.items()
    }
    out = tmp_path / "out"
    assert main(imported(write(serialized(layers)), tiny_gpt2, out)) == 0
    for block, delta in enumerate(deltas(out, tiny_gpt2).values()):
        torch.testing.assert_close(delta, wanted(places, block), atol=1e-5, rtol=0)
    assert read(out).config.r == 2 * RANK
    said = capsys.readouterr().err
    assert "on query, value of 2 blocks" in said
    assert "order" not in said


def test_the_order_of_numbered_layers_can_be_given(
    write: Callable[[bytes], Path], tiny_gpt2: Path, tmp_path: Path
) -> None:
    layers, out = numbered(2), tmp_path / "out"
    assert main(imported(write(serialized(layers)), tiny_gpt2, out, "--order", "value")) == 0
    places = {(i, "value"): layers[f"lora_{i}"] for i in range(2)}
    for block, delta in enumerate(deltas(out, tiny_gpt2).values()):
        torch.testing.assert_close(delta, wanted(places, block), atol=1e-5, rtol=0)


def test_separate_projections_stay_separate(
    write: Callable[[bytes], Path], tiny_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    layers: Layers = {}
    for i in range(BLOCKS):
        for j, width in enumerate((96, 32, 32)):
            generator = torch.Generator().manual_seed(3 * i + j)
            layers[f"lora_{3 * i + j}"] = {
                "lora_a": torch.randn(RANK, HIDDEN, generator=generator),
                "lora_b": torch.randn(width, RANK, generator=generator),
            }
    file, out = write(serialized(layers)), tmp_path / "out"
    assert main(imported(file, tiny_model, out)) == 2
    assert "their order is not known; give it with --order" in capsys.readouterr().err
    assert main(imported(file, tiny_model, out, "--order", "query,key,value")) == 0
    found = deltas(out, tiny_model)
    assert len(found) == 3 * BLOCKS
    own = layers["lora_4"]
    torch.testing.assert_close(
        found["model.layers.1.self_attn.k_proj"], 2.5 * own["lora_b"] @ own["lora_a"]
    )


def without(name: str) -> Layers:
    layers = numbered()
    del layers[name]
    return layers


@pytest.mark.parametrize(
    ("layers", "flags", "message"),
    [
        (numbered(), ["--r", "8"], "--r 8: the file's LoRA layers have rank 2"),
        (numbered(), ["--alpha", "0"], "--alpha must be a number above 0"),
        (numbered(), ["--alpha", "nan"], "--alpha must be a number above 0"),
        (numbered(), ["--order", "query,kay"], "--order query,kay: give some of query,key,value"),
        (numbered(), ["--order", "key,key"], "--order key,key: give some of"),
        (numbered(5), [], "the file has 5 LoRA layers; 2 blocks with key, value, query make 6"),
        (without("lora_2"), [], "are not numbered from 0 to 4"),
        ({"dropout_0": {}}, [], "the file has no LoRA layers (its layers: dropout_0)"),
        (numbered() | {"lora_x": pair(1)}, [], "layer 'lora_x' is on no block's query"),
        (numbered() | {"lora_1": pair(1, rank=3)}, [], "have different ranks: [2, 3]"),
        (numbered() | {"lora_1": pair(1, width=32)}, [], "of 32 inputs and 32 outputs"),
        (numbered() | {"lora_1": {"lora_a": torch.ones(2, 48)}}, [], "is not LoRA on a linear"),
        (
            numbered() | {"lora_1": {"lora_a": torch.ones(3, 3, 2, 2), "lora_b": torch.ones(2, 2)}},
            [],
            "convolutions are not for text models",
        ),
        (
            numbered() | {"lora_1": pair(1) | {"lora_a": torch.full((2, 48), torch.inf)}},
            [],
            "a tensor holds NaN or infinity",
        ),
        (
            {f"lora_decoder.blocks.{i}.self_attention.key": pair(i) for i in (0, 2)},
            [],
            "are not on all of the base's 2 blocks alone",
        ),
        (
            {f"lora_{x}.blocks.0.self_attention.key": pair(i) for i, x in enumerate("ab")},
            [],
            "two LoRA layers on one projection",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    layers: Layers,
    flags: list[str],
    message: str,
    write: Callable[[bytes], Path],
    tiny_gpt2: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    out = tmp_path / "out"
    assert main(imported(write(serialized(layers)), tiny_gpt2, out, *flags)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_on_a_full_disk_it_says_what_to_do_and_can_be_run_again(
    write: Callable[[bytes], Path],
    tiny_gpt2: Path,
    tmp_path: Path,
    capsys: Capture,
    full_disk: FullDisk,
) -> None:
    out = tmp_path / "out"
    command = imported(write(serialized(numbered())), tiny_gpt2, out)

    with full_disk():
        assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{out} cannot be written: No space left on device; make room there, or choose" in said
    assert not list(out.glob("**/*"))
    assert main(command) == 0


def test_places_that_cannot_be_used_are_named(
    write: Callable[[bytes], Path], tiny_gpt2: Path, gemma2: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, out = write(serialized(numbered())), tmp_path / "out"

    def error(*argv: str) -> str:
        assert main(list(argv)) == 2
        return capsys.readouterr().err

    assert "nothing.lorax cannot be read: No such file" in error(
        *imported(tmp_path / "nothing.lorax", tiny_gpt2, out)
    )
    assert "is not a file of at most" in error(*imported(tmp_path, tiny_gpt2, out))
    assert "no such directory" in error(*imported(file, Path("/nowhere"), out))
    assert "exists; choose a directory" in error(*imported(file, tiny_gpt2, file))
    assert "required: --alpha" in error(
        "import", str(file), "--model", str(tiny_gpt2), "--out", str(out)
    )
    layers = {f"lora_{x}.blocks.{i}.self_attention.query": pair(i) for i, x in enumerate("ab")}
    said = error(*imported(write(serialized(layers)), gemma2, out))
    assert "the file's LoRA is for a module of 48 inputs and 48 outputs" in said


def test_integers_floats_strings_and_large_tuples_are_read() -> None:
    term = [0, -1, 70_000, 1 << 70, -(1 << 70), 1.5, b"x", Atom("nil"), (), {b"k": [2]}]
    assert read_term(b"\x83" + etf(term)) == term
    assert read_term(b"\x83\x6b\x00\x02\x07\x08") == [7, 8]
    assert read_term(b"\x83\x69\x00\x00\x00\x01\x6a") == ([],)
    assert read_term(b"\x83\x64\x00\x02ok") == read_term(b"\x83\x73\x02ok") == Atom("ok")
    assert read_term("\x83v\x00\x02é".encode("latin-1")[:4] + "é".encode()) == Atom("é")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it begins neither with nx nor as an Erlang term"),
        (b"PK\x03\x04", "it begins neither with nx nor as an Erlang term"),
        (b"\x83", "it is cut short"),
        (b"\x83\x68", "it is cut short"),
        (b"\x83\x68\xff\x6a", "it is cut short"),
        (b"\x83\x6c\xff\xff\xff\xff\x6a", "it is cut short"),
        (b"\x83\x6d\xff\xff\xff\xff", "it is cut short"),
        (b"\x83\x74\xff\xff\xff\xff\x6a", "it is cut short"),
        (b"\x83\x6a\x6a", "1 bytes follow its term"),
        (b"\x83\x58aaaa", "a part of kind 88, which tensors do not need"),
        (b"\x83\x70aaaa", "a part of kind 112, which tensors do not need"),
        (b"\x83\x6c\x00\x00\x00\x01\x6a\x61\x01", "a list without an end"),
        (b"\x83" + b"\x68\x01" * 40 + b"\x6a", "deeper or has more parts than tensors need"),
        (b"\x83\x6c\x00\x04\x93\xe0" + b"\x6a" * 300_001, "has more parts than tensors need"),
        (b"\x83\x77\x01\xff", "an atom that is no text"),
        (b"\x83\x76\x01\x00" + b"a" * 256, "longer or more atoms than tensors need"),
        (
            b"\x83"
            + b"\x6c\x00\x00\x2e\xe0"
            + b"".join(b"\x77\x05%05d" % i for i in range(12_000))
            + b"\x6a",
            "longer or more atoms than tensors need",
        ),
        (b"\x83\x74\x00\x00\x00\x01\x6a\x6a", "a key that is no name, or there twice"),
        (b"\x83\x74\x00\x00\x00\x02\x61\x01\x6a\x61\x01\x6a", "no name, or there twice"),
        (b"\x83\x61\x01", "where a map should be there is something else"),
        (b"\x83\x74\x00\x00\x00\x01\x61\x01\x6a", "a map has a key that is no name"),
        (b"\x83\x50\xff\xff\xff\xff", "compressed term says to be larger than"),
        (b"\x83\x50\x00\x00\x00\x01abc", "its compressed term is damaged"),
        (b"\x83\x50\x00\x00\x00\x01" + zlib.compress(bytes(1 << 20)), "does not hold the 1 bytes"),
        (b"\x83\x50\x00\x00\x00\x02" + zlib.compress(b"\x6a"), "does not hold the 2 bytes"),
        (b"nx\x02\x00" + bytes(8), "only version 1 of Nx.serialize's format is read"),
        (b"nx\x01\x02" + bytes(8), "only version 1 of Nx.serialize's format is read"),
        (b"nx\x01\x00" + b"\xff" * 8, "it is cut short"),
        (b"nx\x01\x00" + bytes(8), "it does not begin as an Erlang term does"),
    ],
)
def test_what_is_no_such_file_is_said(
    data: bytes, message: str, write: Callable[[bytes], Path]
) -> None:
    path = write(data)
    with pytest.raises(TrainingError, match=r"params\.lorax is no parameters that Elixir") as error:
        read_layers(path)
    assert message in str(error.value)


def test_a_large_file_is_not_read(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nx, "_MAX_FILE", 8)
    with pytest.raises(TrainingError, match="is not a file of at most 8 bytes"):
        read_layers(write(serialized(numbered())))


def test_numbers_that_are_on_a_device_are_not_in_the_file(write: Callable[[bytes], Path]) -> None:
    data = term_to_binary({"lora_0": pair(0)}).replace(b"BinaryBackend", b"RemoteBackend")
    with pytest.raises(TrainingError, match="not in it but on a device; write the file with Nx"):
        read_layers(write(data))


FILES = [
    serialized(numbered(2)),
    term_to_binary({"lora_0": pair(0)}),
    term_to_binary({"lora_0": pair(0)}, compressed=True),
]


def read_or_refuse(path: Path) -> None:
    with suppress(TrainingError):
        read_layers(path)


@pytest.mark.parametrize("data", FILES, ids=["Nx.serialize", "term_to_binary", "compressed"])
def test_a_file_that_is_cut_short_is_refused(data: bytes, write: Callable[[bytes], Path]) -> None:
    for length in [*range(min(len(data), 600)), *range(600, len(data), 97)]:
        with pytest.raises(TrainingError):
            read_layers(write(data[:length]))


@pytest.mark.parametrize("data", FILES, ids=["Nx.serialize", "term_to_binary", "compressed"])
def test_a_damaged_file_is_read_or_refused(data: bytes, write: Callable[[bytes], Path]) -> None:
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.randrange(min(len(data), 700))
            damaged[at] = draw.choice([damaged[at] ^ 1 << draw.randrange(8), draw.randrange(256)])
        read_or_refuse(write(bytes(damaged)))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=64), start=st.sampled_from([b"\x83", b"nx\x01\x00", b"\x83P", b""]))
def test_any_bytes_are_read_or_refused(
    data: bytes, start: bytes, write: Callable[[bytes], Path]
) -> None:
    read_or_refuse(write(start + data))
