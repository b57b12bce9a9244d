"""An adapter directory: read as written, and refused when damaged, whatever the damage."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoRAConfig,
    ModuleShape,
    Role,
    match_weights,
    read,
    save,
    tensor_name,
)
from lorax_serve.errors import AdapterRejected, RejectReason
from tests.adapter.peft_side import tiny_modules

MODULES = {"layers.0.q": ModuleShape(3, 2), "layers.0.v": ModuleShape(3, 2)}
CONFIG = LoRAConfig(r=1, target_modules=("q",), rank_pattern={"v": 2})
TENSORS = {
    tensor_name("layers.0.q", Role.A): torch.tensor([[1.0, 2.0, 3.0]]),
    tensor_name("layers.0.q", Role.B): torch.tensor([[0.5], [-0.5]]),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small valid adapter."""
    save(tmp_path / "one", CONFIG, TENSORS)
    return tmp_path / "one"


def rejection(directory: Path) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        read(directory)
    return caught.value


def test_what_is_saved_is_read(adapter: Path) -> None:
    files = read(adapter)
    assert files.config == CONFIG
    assert files.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(files.tensors[name], tensor)
    assert match_weights(files.config, files.tensors, MODULES).max_rank == 1
    assert sorted(path.name for path in adapter.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_layouts_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(4, 6).to(dtype).T.requires_grad_()
    save(tmp_path, CONFIG, {"x": tensor}, {"made_by": "a test"})
    read_back = read(tmp_path).tensors["x"]
    assert read_back.dtype == dtype
    assert torch.equal(read_back, tensor)
    with safetensors.safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "a test"}


def test_the_headers_strings_are_read_and_need_not_be_there(adapter: Path) -> None:
    assert read(adapter).metadata == {"format": "pt"}
    save(adapter, CONFIG, TENSORS, {"made_by": "a tést"})
    assert read(adapter).metadata == {"format": "pt", "made_by": "a tést"}
    (adapter / WEIGHTS_FILE).write_bytes(safetensors.torch.save(dict(TENSORS)))
    assert read(adapter).metadata == {}


def test_saving_replaces(adapter: Path) -> None:
    before = read(adapter).digest
    save(adapter, CONFIG, {name: tensor + 1 for name, tensor in TENSORS.items()})
    assert read(adapter).digest != before
    save(adapter, CONFIG, TENSORS)
    assert read(adapter).digest == before


def test_digest_covers_both_files(adapter: Path, tmp_path: Path) -> None:
    digests = {read(adapter).digest}
    for number, (config, tensors) in enumerate(
        [
            (LoRAConfig(r=1, lora_alpha=9, target_modules=("q",)), TENSORS),
            (CONFIG, TENSORS | {tensor_name("layers.0.q", Role.A): torch.zeros(1, 3)}),
            (CONFIG, {name + "x": tensor for name, tensor in TENSORS.items()}),
        ]
    ):
        save(tmp_path / str(number), config, tensors)
        digests.add(read(tmp_path / str(number)).digest)
    assert len(digests) == 4
    assert all(len(digest) == 64 for digest in digests)


def test_peft_reads_what_is_saved_and_the_other_way_round(
    make_adapter: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    written = make_adapter("written", r=3, target_modules=["q_proj", "up_proj"])
    files = read(written)
    assert match_weights(files.config, files.tensors, tiny_modules()).max_rank == 3
    save(tmp_path / "again", files.config, files.tensors)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    state = PeftModel.from_pretrained(base, str(tmp_path / "again")).state_dict()
    for name, tensor in files.tensors.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    (adapter / "adapter_model.bin").touch()
    error = rejection(adapter)
    assert error.reason is RejectReason.MISSING_FILE
    assert name in str(error)
    assert "found: adapter_" in str(error)


def test_missing_directory(tmp_path: Path) -> None:
    error = rejection(tmp_path / "none")
    assert error.reason is RejectReason.MISSING_FILE
    assert "no such directory" in str(error)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_directory_in_the_place_of_a_file(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    (adapter / name).mkdir()
    error = rejection(adapter)
    assert error.reason is RejectReason.BAD_FILE
    assert name in str(error)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_what_is_no_regular_file_is_not_waited_for(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    error = rejection(adapter)
    assert error.reason is RejectReason.BAD_FILE
    assert str(error) == f"{name} is not a regular file"
    (adapter / name).unlink()
    (adapter / name).symlink_to("/dev/zero")
    assert str(rejection(adapter)) == str(error)


def test_links_to_files_are_followed(adapter: Path) -> None:
    before = read(adapter).digest
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (adapter / name).rename(adapter / f"blob-{name}")
        (adapter / name).symlink_to(f"blob-{name}")
    assert read(adapter).digest == before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"]
)
def test_config_that_is_not_json(adapter: Path, content: bytes) -> None:
    (adapter / CONFIG_FILE).write_bytes(content)
    error = rejection(adapter)
    assert error.reason is RejectReason.BAD_CONFIG
    assert CONFIG_FILE in str(error)


def test_config_too_large(adapter: Path) -> None:
    (adapter / CONFIG_FILE).write_bytes(b" " * (1 << 21))
    error = rejection(adapter)
    assert error.reason is RejectReason.BAD_CONFIG
    assert "larger" in str(error)


def test_refused_config_keeps_its_reason(adapter: Path) -> None:
    raw = json.loads((adapter / CONFIG_FILE).read_text()) | {"use_qalora": True}
    (adapter / CONFIG_FILE).write_text(json.dumps(raw))
    assert rejection(adapter).reason is RejectReason.UNSUPPORTED


def test_truncated_weights(adapter: Path) -> None:
    whole = (adapter / WEIGHTS_FILE).read_bytes()
    for length in {*range(0, len(whole), 7), len(whole) - 1}:
        (adapter / WEIGHTS_FILE).write_bytes(whole[:length])
        error = rejection(adapter)
        assert error.reason is RejectReason.BAD_FILE
        assert WEIGHTS_FILE in str(error)


def test_weights_that_are_something_else(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert rejection(adapter).reason is RejectReason.BAD_FILE


def test_a_failed_save_leaves_what_was_there(adapter: Path) -> None:
    before = read(adapter).digest
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save(adapter, CONFIG, {"a": shared, "b": shared})
    assert read(adapter).digest == before
    assert len(list(adapter.iterdir())) == 2


Mutation = tuple[int, int, bytes]
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


# What ``save`` writes, without its fsync.
WHOLE = {
    CONFIG_FILE: json.dumps(CONFIG.to_dict(), indent=2).encode() + b"\n",
    WEIGHTS_FILE: safetensors.torch.save(TENSORS, {"format": "pt"}),
}


@contextmanager
def written(changed: dict[str, bytes]) -> Iterator[Path]:
    """A directory with the adapter's files, some of them changed."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in (WHOLE | changed).items():
            (Path(directory) / name).write_bytes(data)
        yield Path(directory)


def test_the_same_adapter_has_the_same_digest(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(12)}
    digests = set()
    for n in range(4):
        save(tmp_path / str(n), CONFIG, TENSORS, metadata)
        digests.add(read(tmp_path / str(n)).digest)
    assert len(digests) == 1


def mutated(data: bytes, mutations: list[Mutation]) -> bytes:
    """Replace a few bytes at a few places by others."""
    for place, removed, added in mutations:
        at = place % (len(data) + 1)
        data = data[:at] + added + data[at + removed :]
    return data


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(mutations=MUTATIONS)
def test_damage_is_refused_or_harmless(name: str, mutations: list[Mutation]) -> None:
    with written({name: mutated(WHOLE[name], mutations)}) as root:
        try:
            files = read(root)
            match_weights(files.config, files.tensors, MODULES)
        except AdapterRejected as error:
            assert error.reason in RejectReason  # noqa: PT017
            assert str(error)  # noqa: PT017


TEXTS = ["1", "-1", "null", "true", '"("', '"all-linear"', "[]", '["q"]', "{}", '{"(": 1}']
VALUES = st.sampled_from([*TEXTS, "1e999", "NaN", "1" + "0" * 400, '"\\ud800"', '{"q": 1e400}'])
KEYS = st.sampled_from([*sorted(CONFIG.to_dict()), "exclude_modules", "use_dora", "surprise"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_odd_config_values_are_refused_or_harmless(changes: dict[str, str]) -> None:
    fields = {key: json.dumps(value) for key, value in CONFIG.to_dict().items()} | changes
    raw = json.loads("{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}")
    try:
        match_weights(LoRAConfig.from_dict(raw), TENSORS, MODULES)
    except AdapterRejected as error:
        assert str(error)  # noqa: PT017


@settings(max_examples=150, deadline=None, derandomize=True)
@given(header=st.data())
def test_odd_weight_headers_are_refused_or_harmless(header: st.DataObject) -> None:
    dtypes = ["F64", "F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "U16", "X"]
    entry = {
        "dtype": header.draw(st.sampled_from(dtypes)),
        "shape": header.draw(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 1 << 62]), max_size=3)),
        "data_offsets": [0, header.draw(st.integers(0, 24))],
    }
    text = json.dumps({tensor_name("layers.0.q", Role.A): entry}).encode()
    size = header.draw(st.sampled_from([0, 12, 24]))
    data = len(text).to_bytes(8, "little") + text + bytes(size)
    # At least the B is missing.
    with written({WEIGHTS_FILE: data}) as root, pytest.raises(AdapterRejected):
        match_weights(CONFIG, read(root).tensors, MODULES)
