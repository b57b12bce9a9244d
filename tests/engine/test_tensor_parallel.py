"""Two processes compute a model together and say what one says; real ones, with gloo."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.adapter import match_weights, read, save
from lorax_serve.checkpoint.loader import load_weights
from lorax_serve.checkpoint.part import WHOLE, Part
from lorax_serve.checkpoint.spec_cache import load_spec
from lorax_serve.checkpoint.weights import DecoderWeights
from lorax_serve.config import EngineConfig
from lorax_serve.core import RowCopy, StopReason
from lorax_serve.engine.messages import DropAdapter, LoadAdapter
from lorax_serve.errors import AdapterRejected, InvalidRequest, ModelUnsupported, RejectReason
from lorax_serve.model.adapters.fold import fold
from lorax_serve.model.decoders.base_model import BaseModel
from lorax_serve.model.parallel import workers as workers_module
from lorax_serve.model.parallel.cut import cut
from lorax_serve.model.parallel.messages import Copy
from lorax_serve.model.runner import ModelRunner
from tests.engine.test_engine import Local, prompt
from tests.engine.test_probe_at_load import write_probe
from tests.helpers import save_peft_adapter, save_tiny_model
from tests.model.test_golden_peft import architectures

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The processes share what cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def engine(model: Path, ranks: int, **settings: Any) -> Iterator[Local]:
    local = Local(model, kernels="paged", tensor_parallel=ranks, **settings)
    with closing(local.runner):
        yield local


def adapters_of(kind: str, model: Path, place: Path) -> list[Path]:
    conv = kind == "gpt2"
    first, second = (["c_attn", "c_proj"], ["c_fc"]) if conv else (["q_proj", "v_proj"], ["o_proj"])
    norms = ["ln_1", "ln_f"] if conv else ["input_layernorm", "model.norm"]
    configs: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "target_modules": first},
        {"r": 16, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 3, "target_modules": "all-linear", "use_dora": True, "bias": "all"},
        {"r": 8, "target_modules": [*second, "lm_head"], "modules_to_save": norms},
    ]
    made = []
    for seed, config in enumerate(configs):
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # of PEFT, on Conv1D and on tied weights
            warnings.simplefilter("ignore")
            made.append(save_peft_adapter(model, place / f"{kind}-{seed}", **config))
    return made


def a_busy_day(local: Local, adapters: list[Path]) -> dict[int, list[tuple[int | None, float]]]:
    """More adapters than slots and more tokens than pages, prompts in chunks, prefixes that are
    shared, loads and drops under running requests; all tokens and their log-probabilities."""
    shared = prompt(70, 0)
    local.load(1, adapters[0])
    local.load(2, adapters[1])
    for key in range(4):
        local.submit(key, prompt(5 + 13 * key, key), (None, 1, 2)[key % 3], new=20, logprobs=0)
    for _ in range(3):
        local.step()
    local.load(3, adapters[2])
    local.load(4, adapters[3])
    for key in range(4, 9):
        adapter = (3, 3, 3, 4, None)[key - 4]
        local.submit(key, shared + prompt(key, key), adapter, new=12, logprobs=2)
    local.run()
    local.engine.handle(DropAdapter(9, 3))
    local.report()
    local.load(5, adapters[2])  # the same under another number: its prefixes are known
    drawn = {"temperature": 0.9, "top_k": 20, "seed": 5, "repetition_penalty": 1.3}
    for key, adapter in ((9, 5), (10, 4), (11, None)):
        local.submit(key, shared + prompt(9, key), adapter, new=10, logprobs=0, **drawn)
    local.run()
    for key in range(12, 16):  # each begins in one page, and none is left when they grow
        local.submit(key, prompt(9, key), (None, 1)[key % 2], new=60, logprobs=0)
    local.run()
    assert local.stats.preemptions > 0
    assert local.stats.prefix_cache_hits > 0
    assert local.stats.adapters.device_evictions > 0
    assert all(local.runner.logits_after(shared, [7], None))
    return {
        key: [(o.token_id, o.logprob or 0.0) for o in outputs]
        for key, outputs in local.outputs.items()
    }


@pytest.mark.parametrize("kind", ["llama3_rope_and_biases", "gpt2", "qwen3"])
def test_two_say_what_one_says(kind: str, tmp_path: Path) -> None:
    config = architectures()[kind]
    if kind == "qwen3":
        config.vocab_size = 129  # the second one has a token less
    save_tiny_model(tmp_path / "model", config)
    adapters = adapters_of(kind, tmp_path / "model", tmp_path)
    said = []
    for ranks in (1, 2):
        settings = {"adapter_slots": 2, "max_batch_tokens": 40, "kv_cache_tokens": 192}
        with engine(tmp_path / "model", ranks, max_sequence_length=128, **settings) as local:
            local.runner.warm_up()
            said.append(a_busy_day(local, adapters))
    one, two = said
    assert [[t for t, _ in row] for row in one.values()] == [
        [t for t, _ in row] for row in two.values()
    ]
    for key, row in one.items():
        found = torch.tensor([logprob for _, logprob in two[key]])
        torch.testing.assert_close(
            found, torch.tensor([logprob for _, logprob in row]), atol=1e-4, rtol=0
        )


def test_an_adapter_answers_its_probe(tiny_model: Path, make_adapter: Callable[..., Path]) -> None:
    directory = make_adapter("probed", r=8, target_modules="all-linear", use_dora=True)
    write_probe(tiny_model, directory)
    with engine(tiny_model, 2) as local:
        local.load(1, directory)
        other = make_adapter("other", 3, r=8, target_modules="all-linear")
        files = read(other)
        save(other, files.config, files.tensors, read(directory).metadata)
        local.engine.handle(LoadAdapter(2, 2, str(other)))
        local.engine.handle(local.inbox.get(timeout=60))
        (reply,) = local.report()
        assert isinstance(reply.error, AdapterRejected)
        assert reply.error.reason is RejectReason.PROBE_FAILED
        local.submit(1, prompt(10, 1), 1)
        assert len(local.run()[1]) == 8


@pytest.mark.parametrize("kind", ["llama3_rope_and_biases", "gpt2_relu_and_untied"])
def test_each_rank_has_its_part(kind: str, tmp_path: Path) -> None:
    """Of the weights and of an adapter, in shapes alike; together they are the whole."""
    model = tmp_path / "model"
    save_tiny_model(model, architectures()[kind])
    whole, *parts = (layers_of(model, part) for part in (WHOLE, Part(0, 2), Part(1, 2)))
    for name, tensor in whole.items():
        have = [part[name] for part in parts if name in part]
        site = name.split(".")[-2:][0]
        if site in ("o", "down") and name.endswith("bias"):
            assert len(have) == 1, "a bias that is added once"
        elif site in ("o", "down"):
            assert torch.equal(torch.cat(have, 1), tensor)
        elif site in ("qkv", "gate_up"):
            assert [len(part) for part in have] == [len(tensor) // 2] * 2
            rows = torch.cat(have)
            assert torch.equal(rows.sort(0).values, tensor.sort(0).values)
        elif name == "head":
            assert torch.equal(torch.cat(have), tensor)
    spec = load_spec(model)
    directory = adapters_of("gpt2" if kind.startswith("gpt2") else "", model, tmp_path)[1]
    with load_weights(model, torch.float32, CPU) as weights:
        base = BaseModel(weights)
    files = read(directory)
    folded = fold(match_weights(files.config, files.tensors, spec.modules()), base)
    sizes = {cut(folded, Part(rank, 2), spec).nbytes for rank in range(2)}
    (size,) = sizes
    # Of each pair, the one matrix that the cut goes through is halved; most of MLPs are wide.
    assert 0.5 < size / folded.nbytes < 0.8


def layers_of(model: Path, part: Part) -> dict[str, torch.Tensor]:
    with load_weights(model, torch.float32, CPU, part) as weights:
        return dict(_named(weights))


def _named(weights: DecoderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "head", weights.head
    for index, layer in enumerate(weights.layers):
        for name in ("qkv", "o", "gate_up", "down"):
            linear = getattr(layer, name)
            yield f"{index}.{name}.weight", linear.weight
            if linear.bias is not None:
                yield f"{index}.{name}.bias", linear.bias


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 3}, "the model's 2 key and value heads do not divide by 3"),
        ({"tensor_parallel": 4}, "the model's 6 attention heads do not divide by 4"),
        ({"tensor_parallel": 2, "kernels": "torch"}, "with --kernels torch another one"),
        ({"tensor_parallel": 2, "kernels": "auto"}, "is for the GPU's decoder"),
        ({"tensor_parallel": 2, "batch_invariant": True}, "with --batch-invariant another one"),
    ],
)
def test_what_cannot_be_had_is_refused(
    settings: dict[str, Any], message: str, tiny_model: Path
) -> None:
    config = EngineConfig(
        **{"model": str(tiny_model), "device": "cpu", "kernels": "paged"} | settings
    )
    with pytest.raises(ModelUnsupported, match=message):
        ModelRunner(config)


def test_less_than_one_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="tensor_parallel must be at least 1, found 0"):
        EngineConfig(tensor_parallel=0)


def test_a_rank_that_fails_ends_the_requests_with_its_reason(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "_GRACE_SECONDS", 600.0)  # this process is the test's
    with engine(tiny_model, 2) as local:
        local.submit(1, prompt(10, 1), new=100)
        local.step()
        workers = local.runner._workers
        assert workers is not None
        workers.tell(Copy([RowCopy(1 << 20, 0, 5)]))  # there is no such row
        started = time.monotonic()
        while local.engine.busy:
            local.engine.step()
            local.report()
        assert time.monotonic() - started < 60
        last = local.outputs[1][-1]
        assert last.stop_reason is StopReason.ERROR
        assert last.error is not None
        assert "rank 1 of 2: IndexError" in last.error
        assert local.runner.lost
        local.submit(2, prompt(10, 1))
        local.engine.step()
        local.report()
        assert "rank 1 of 2: IndexError" in str(local.outputs[2][-1].error)


def test_adapters_that_the_host_forgets_are_forgotten_everywhere(
    tiny_model: Path, make_adapter: Callable[..., Path]
) -> None:
    with engine(tiny_model, 2, adapter_slots=1) as local:
        workers = local.runner._workers
        assert workers is not None
        for version in range(1, 4):
            directory = make_adapter(f"a{version}", version, r=4, target_modules="all-linear")
            local.load(version, directory)
            local.engine.handle(DropAdapter(version, version))
            local.report()
        assert list(workers._dropped) == [0, 1, 2]
        local.submit(1, prompt(10, 1))
        local.run()
        assert not workers._dropped
