"""A real engine that adds adapters up: it reads their files, and again when memory was short."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax_serve import adapter as leaf
from lorax_serve.core import Part
from lorax_serve.engine.messages import LoadAdapter
from lorax_serve.errors import AdapterRejected, EngineFailed, Overloaded, RejectReason
from tests.engine.test_adapter_memory import InProcess
from tests.helpers import each_kernels, save_peft_adapter

Make = Callable[..., Path]
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.fixture
def a(make_adapter: Make) -> Path:
    return make_adapter("a", 1, r=3, lora_alpha=5, target_modules="all-linear")


@pytest.fixture
def b(make_adapter: Make) -> Path:
    return make_adapter("b", 2, r=4, use_rslora=True, target_modules=["q_proj", "down_proj"])


@each_kernels
def test_one_with_scale_1_is_that_adapter(tiny_model: Path, a: Path, b: Path, kernels: str) -> None:
    engine = InProcess(tiny_model, kernels=kernels)
    alone = engine.load(1, a)
    composed = engine.compose(2, (a, 1))
    assert (composed.nbytes, composed.max_rank, composed.num_modules) == (
        alone.nbytes,
        alone.max_rank,
        alone.num_modules,
    )
    assert composed.digest != alone.digest
    engine.compose(3, (a, 1), (b, 0))
    tokens = engine.generate([1, 2, 3, None])
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3]


def test_the_digest_is_of_contents_and_scales(tiny_model: Path, a: Path, b: Path) -> None:
    """Cached keys and values are reused under the same digest."""
    engine = InProcess(tiny_model)
    digests = [
        engine.compose(version, *parts).digest
        for version, parts in enumerate(
            [
                ((a, 1), (b, 1)),
                ((a, 1), (b, 0.5)),
                ((a, 0.5), (b, 1)),
                ((a, 1),),
                ((b, 1),),
                ((a, -1),),
            ],
            1,
        )
    ]
    assert len({*digests, engine.load(8, a).digest}) == 7
    assert engine.compose(9, (a, 1), (b, 1)).digest == digests[0]


@each_kernels
def test_cached_prefixes_are_not_shared_between_scales(
    tiny_model: Path, a: Path, b: Path, kernels: str
) -> None:
    prompt = tuple(3 + 7 * n % 120 for n in range(48))
    cached = InProcess(tiny_model, kernels=kernels)
    fresh = InProcess(tiny_model, kernels=kernels, prefix_caching=False)
    scales = [(1, 1), (1, -1), (0.5, 1), (1, 1), (0, 1)]
    for engine in (cached, fresh):
        engine.load(1, a)
        for version, (one, two) in enumerate(scales, 2):
            engine.compose(version, (a, one), (b, two))
    seen = []
    for version in [1, None, *range(2, 7)]:
        hits = cached.stats.prefix_cache_hits
        (tokens,) = cached.finish([cached.submit(version, prompt=prompt)])
        assert [tokens] == fresh.finish([fresh.submit(version, prompt=prompt)])
        seen.append((tuple(tokens), cached.stats.prefix_cache_hits > hits))
    assert [hit for _, hit in seen] == [False, False, False, False, False, True, False]
    assert len({tokens for tokens, _ in seen}) == 6, "each scale has an answer of its own"


def test_more_compositions_than_memory_give_the_same_tokens(
    tiny_model: Path, a: Path, b: Path
) -> None:
    large = InProcess(tiny_model)
    whole = large.compose(1, (a, 1), (b, 1)).nbytes
    small = InProcess(tiny_model, max_adapter_bytes=2 * whole, adapter_slots=2)
    large.drop(1)
    for engine in (large, small):
        engine.load(1, a)
        engine.load(2, b)
        for version, scale in enumerate((-1, 0.5, 2, 3), 3):
            engine.compose(version, (a, scale), (b, 1))
    asked = [3, 1, 4, None, 5, 2, 6, 3, 6, 5, 1, 4]
    expected = large.generate(asked)
    assert len({tuple(tokens) for tokens in expected}) == 7
    assert small.generate(asked) == small.generate(asked) == expected
    tiers = small.stats.adapters
    assert tiers.known == 6
    assert tiers.reads >= 4
    assert 0 < small.most_bytes <= 2 * whole
    assert sum(small.drop(version) for version in range(1, 7)) == tiers.host_bytes
    left = small.stats.adapters
    assert (left.known, left.host, left.device, left.host_bytes) == (0, 0, 0, 0)


def test_files_of_a_part_that_changed_fail_what_is_made_of_it(
    tiny_model: Path, a: Path, b: Path
) -> None:
    large = InProcess(tiny_model)
    small = InProcess(tiny_model, max_adapter_bytes=large.compose(1, (a, 1), (b, 1)).nbytes)
    small.load(1, a)
    small.compose(2, (a, 1), (b, 1))
    expected = small.generate([1, 2, 1])  # 2 leaves memory for 1
    original = (b / leaf.WEIGHTS_FILE).read_bytes()
    digest = leaf.read(b).digest
    weights = load_file(b / leaf.WEIGHTS_FILE)
    save_file({name: -tensor for name, tensor in weights.items()}, b / leaf.WEIGHTS_FILE)
    composed, other = small.submit(2), small.submit(1)
    small.finish([composed, other])
    assert small.tokens[other] == expected[0]
    error = small.ended[composed].error
    assert "adapter 'b' cannot be read again from disk: the files in b/ are others" in error
    assert error.count("load it again to serve the new ones") == 1
    loaded = (Part("b", str(b), digest, 0.5),)
    with pytest.raises(EngineFailed, match=rf"'b' .*not {digest[:12]}\); .* load it again"):
        small._ask(lambda call: LoadAdapter(call, 3, "a composition", loaded))
    (b / leaf.WEIGHTS_FILE).write_bytes(original)
    assert small.generate([2]) == [expected[1]]


def test_a_composition_beyond_the_budget_is_refused(tiny_model: Path, a: Path, b: Path) -> None:
    large = InProcess(tiny_model)
    whole = large.compose(1, (a, 1), (b, 1)).nbytes
    small = InProcess(tiny_model, max_adapter_bytes=whole - 1)
    with pytest.raises(Overloaded, match=r"together take .* raise that limit or name fewer"):
        small.compose(1, (a, 1), (b, 1))
    assert small.compose(2, (b, 1)).nbytes < whole
    assert small.stats.adapters.known == 1


def test_what_overflows_once_it_is_scaled_is_refused(tiny_model: Path, make_adapter: Make) -> None:
    huge = make_adapter("huge", r=2, lora_alpha=10**38, target_modules=["q_proj"])
    engine = InProcess(tiny_model)
    engine.compose(1, (huge, 0.5))
    with pytest.raises(AdapterRejected, match=r"^100 x huge: the weights overflow torch\.float32"):
        engine.compose(2, (huge, 100))
    assert engine.stats.adapters.known == 1


@each_kernels
def test_eight_of_rank_64(tiny_model: Path, make_adapter: Make, kernels: str) -> None:
    parts = [
        (make_adapter(f"wide{n}", n, r=64, target_modules="all-linear"), (-1) ** n * 0.3)
        for n in range(8)
    ]
    engine = InProcess(tiny_model, kernels=kernels)
    reference = InProcess(tiny_model, kernels="torch")
    assert engine.compose(1, *parts).max_rank == 512
    reference.compose(1, *parts)
    engine.compose(2, *reversed(parts))
    tokens = engine.generate([1, None, 2, None, 1])
    assert tokens == reference.generate([1, None, 1, None, 1])
    assert tokens[0] != tokens[1]


@pytest.fixture
def embedding(tiny_model: Path, tmp_path: Path) -> Path:
    """LoRA on the embedding, beside which PEFT stores the base's own weights."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        directory = save_peft_adapter(
            tiny_model, tmp_path / "words", r=2, target_modules=["embed_tokens", "q_proj"]
        )
    assert f"{EMBEDDING}.base_layer.weight" in load_file(directory / leaf.WEIGHTS_FILE)
    return directory


@each_kernels
def test_a_copy_of_the_base_is_no_change(
    tiny_model: Path, embedding: Path, b: Path, tmp_path: Path, kernels: str
) -> None:
    engine = InProcess(tiny_model, kernels=kernels)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / leaf.CONFIG_FILE).write_bytes((embedding / leaf.CONFIG_FILE).read_bytes())
    tensors = load_file(embedding / leaf.WEIGHTS_FILE)
    del tensors[f"{EMBEDDING}.base_layer.weight"]
    save_file(tensors, bare / leaf.WEIGHTS_FILE)
    with_copy = engine.compose(1, (embedding, 1), (b, -1))
    without = engine.compose(2, (bare, 1), (b, -1))
    assert with_copy.nbytes == without.nbytes
    first, second, base = engine.generate([1, 2, None])
    assert first == second != base


@each_kernels
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("role", ["base_layer.weight", "weight"])
def test_a_copy_that_differs_from_the_base_is_refused(
    tiny_model: Path, embedding: Path, tmp_path: Path, kernels: str, last: bool, role: str
) -> None:
    """It would take the place of the base's, for all parts, whatever its scale."""
    engine = InProcess(tiny_model, kernels=kernels)
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(embedding / leaf.WEIGHTS_FILE)
    copy = tensors.pop(f"{EMBEDDING}.base_layer.weight")
    copy[7, 3] += 1
    tensors[f"{EMBEDDING}.{role}"] = copy
    config = (embedding / leaf.CONFIG_FILE).read_text()
    if role == "weight":
        # PEFT looks at ends of names here, and at whole ones among the targets: it is both.
        assert '"modules_to_save": null' in config
        config = config.replace('"modules_to_save": null', '"modules_to_save": ["tokens"]')
    (other / leaf.CONFIG_FILE).write_text(config)
    save_file(tensors, other / leaf.WEIGHTS_FILE)
    parts = [(embedding, 1.0), (other, 1.0)]
    message = r"adapter 'other' has its own model\.embed_tokens\.weight in place of the base's"
    with pytest.raises(AdapterRejected, match=message) as caught:
        engine.compose(1, *(parts if last else parts[::-1]))
    assert caught.value.reason is RejectReason.UNSUPPORTED
    engine.load(2, other)  # alone, it is applied as it is
    engine.generate([2])
