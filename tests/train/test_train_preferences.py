from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lorax_serve.adapter import read
from lorax_serve.errors import TrainingError
from lorax_train.cli import main, parse
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    ObjectiveConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.data.batches import Share, count_targets, longest_row
from lorax_train.data.dataset import prepare
from lorax_train.data.encode import Example
from lorax_train.data.preference import PreferencePair, encode_preferences
from lorax_train.data.rows import read_rows
from lorax_train.data.tokenizer import Tokenizer
from lorax_train.loop.loss import TargetLoss
from lorax_train.loop.preference_loss import PreferenceFigures, PreferenceLoss
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject_all
from lorax_train.run import train, train_all

CPU = torch.device("cpu")
Rows = list[dict[str, Any]]
WriteRows = Callable[..., Path]
Configure = Callable[..., TrainConfig]
DPO = ObjectiveConfig(name="dpo")


def silent() -> Console:
    return Console(io.StringIO())


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture
def preferences() -> Rows:
    return [
        {"prompt": f"{'ab' * (i % 4)}{i}:", "chosen": f" yes {i}", "rejected": " no" * (1 + i % 3)}
        for i in range(12)
    ]


def encoded(path: Path, tokenizer: Tokenizer) -> list[PreferencePair]:
    return encode_preferences(read_rows(path), tokenizer, 100)[0]


def learned(example: Example, tokenizer: Tokenizer) -> str:
    pairs = zip(example.tokens, example.trained, strict=True)
    return tokenizer.decode([token for token, trained in pairs if trained])


def test_only_the_answers_are_compared(write_rows: WriteRows, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "2+2?", "chosen": " 4", "rejected": " five"}]
    (pair,) = encoded(write_rows(rows), tokenizer)
    assert tokenizer.decode(pair.chosen.tokens) == "2+2? 4<|im_end|>"
    assert tokenizer.decode(pair.rejected.tokens) == "2+2? five<|im_end|>"
    assert learned(pair.chosen, tokenizer) == " 4<|im_end|>"
    assert learned(pair.rejected, tokenizer) == " five<|im_end|>"
    assert pair.tokens == pair.chosen.tokens + pair.rejected.tokens
    assert pair.n_targets == 1


def test_an_earlier_answer_in_the_prompt_is_read_and_not_compared(
    write_rows: WriteRows, tokenizer: Tokenizer
) -> None:
    prompt = [user("hi"), assistant("yo"), user("2+2?")]
    rows = [{"prompt": prompt, "chosen": [assistant("4")], "rejected": [assistant("5")]}]
    (pair,) = encoded(write_rows(rows), tokenizer)
    assert learned(pair.chosen, tokenizer) == "4<|im_end|>"
    assert learned(pair.rejected, tokenizer) == "5<|im_end|>"
    assert "yo" in tokenizer.decode(pair.rejected.tokens)


def test_a_pair_too_long_is_left_out_whole(write_rows: WriteRows, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r" * 50},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ]
    read = list(read_rows(write_rows(rows)))
    pairs, warnings = encode_preferences(read, tokenizer, 20)
    assert [pair.where[-6:] for pair in pairs] == ["line 2"]
    assert len(warnings) == 1
    assert warnings[0].startswith("1 of 2 rows were left out")
    with pytest.raises(TrainingError, match="--max-length 2 tokens"):
        encode_preferences(read, tokenizer, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "a row must have exactly .* for --objective dpo"),
        ({"prompt": "p", "chosen": "c", "rejected": 1}, "rejected is int"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "are the same; take the row out"),
        ({"prompt": "p", "chosen": [assistant("c")], "rejected": "r"}, "chosen is list"),
        (
            {"prompt": [user("p")], "chosen": [user("c")], "rejected": [assistant("r")]},
            "chosen must end with an assistant message",
        ),
        (
            {"prompt": [assistant("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
            "prompt ends with an assistant message",
        ),
        (
            {"prompt": [user("p")], "chosen": [{"role": "x"}], "rejected": [assistant("r")]},
            r"chosen\[0\] must be an object",
        ),
    ],
)
def test_a_row_that_is_no_preference_is_refused(
    row: dict[str, Any], message: str, write_rows: WriteRows
) -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    with pytest.raises(TrainingError, match=message) as caught:
        list(read_rows(write_rows([good, row])))
    assert "rows.jsonl line 2: " in str(caught.value)


def test_strings_and_messages_in_one_file_are_refused(write_rows: WriteRows) -> None:
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
    ]
    with pytest.raises(TrainingError, match=r"line 2: another format than .* line 1"):
        list(read_rows(write_rows(rows)))


def test_preferences_without_the_objective_are_refused(
    llama: Path, configure: Configure, write_rows: WriteRows, preferences: Rows
) -> None:
    with pytest.raises(TrainingError, match="line 1: a row of preferences; add --objective dpo"):
        train(configure(llama, write_rows(preferences)), silent())


def test_other_rows_with_the_objective_are_refused(
    llama: Path, tmp_path: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    with pytest.raises(TrainingError, match="line 1: no row of preferences; for --objective dpo"):
        train(configure(llama, write_rows(pairs), objective=DPO), silent())
    text = tmp_path / "a.txt"
    text.write_text("abc " * 400)
    data = DataConfig(text, text_mode="windows")
    with pytest.raises(TrainingError, match="--text-mode windows reads text, but --objective dpo"):
        train(configure(llama, data, objective=DPO), silent())


def test_stored_pairs_are_what_was_encoded(
    llama: Path,
    tmp_path: Path,
    configure: Configure,
    write_rows: WriteRows,
    preferences: Rows,
    tokenizer: Tokenizer,
) -> None:
    path = write_rows(preferences)
    expected = encoded(path, tokenizer)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        config = configure(llama, DataConfig(path, cache=cache), objective=DPO)
        stored = prepare(config, llama, silent().warn).examples
        assert list(stored) == expected
        assert all(isinstance(pair, PreferencePair) for pair in stored)
        assert count_targets(stored) == count_targets(expected)
        longest = max(len(row.tokens) for pair in expected for row in pair.rows)
        assert len(longest_row(stored).tokens) == len(longest_row(expected).tokens) == longest
    with pytest.raises(TrainingError, match="add --objective dpo"):
        prepare(configure(llama, DataConfig(path, cache=tmp_path / "cache")), llama, silent().warn)


def test_only_the_longer_answer_must_fit_the_models_positions(
    llama: Path, configure: Configure, write_rows: WriteRows
) -> None:
    rows = [{"prompt": "p", "chosen": "c" * 100, "rejected": "r" * n} for n in (100, 140)]
    config = configure(llama, write_rows(rows[:1]), objective=DPO, steps=1)
    assert train(config, silent()).record.steps == 1  # 204 tokens, 102 at most in a row
    config = configure(llama, write_rows(rows), objective=DPO, steps=1)
    with pytest.raises(TrainingError, match=r"142 tokens, but .* has 128 positions"):
        train(config, silent())


def test_preferences_come_from_parquet_too(
    tmp_path: Path, write_rows: WriteRows, tokenizer: Tokenizer
) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    (found,), (expected,) = encoded(path, tokenizer), encoded(write_rows(rows), tokenizer)
    assert (found.tokens, found.trained) == (expected.tokens, expected.trained)


@pytest.mark.parametrize(
    ("base", "targets", "padded"),
    [
        ("llama", "all-linear", False),
        ("llama", "q_proj,lm_head", False),
        ("gpt2", "all-linear", False),
        ("gemma2", "all-linear", True),
    ],
    indirect=["base"],
)
def test_loss_and_gradient_are_those_of_plain_autograd(
    base: Path,
    targets: str,
    padded: bool,
    write_rows: WriteRows,
    preferences: Rows,
    tokenizer: Tokenizer,
) -> None:
    pairs = encoded(write_rows(preferences), tokenizer)
    model = load_model("tiny", base, torch.float32, CPU)
    loss = TargetLoss.prepare(model, pairs[0].chosen)
    loss.padded = loss.padded or padded
    settings = [InjectionConfig(r=2, targets=targets), InjectionConfig(r=3, targets=targets)]
    adapters = inject_all(model, settings, "tiny", [0, 1])
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters:
        for own in adapter.pairs().values():
            own.b.data.normal_(std=0.05, generator=generator)
    loss.routing = adapters[0].routing
    betas = {0: 0.1, 1: 0.7}
    shares = [Share(0, pairs[:5], 1 / 5), Share(1, pairs[5:8], 1 / 3)]
    dpo = PreferenceLoss(loss, betas)
    total, each = dpo(dpo.collate(shares, 0))
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    found = torch.autograd.grad(total, parameters)

    untouched = load_model("tiny", base, torch.float32, CPU)

    def log_probability(of: Any, row: Example) -> torch.Tensor:
        """Summed over the completion's tokens, one row at a time and all logits at once."""
        tokens = torch.tensor([row.tokens])
        logits = of(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None]).squeeze(-1)
        result: torch.Tensor = chosen[torch.tensor(row.trained[1:])].sum()
        return result

    expected_each, margins = [], []
    expected = torch.zeros(())
    for share in shares:
        beta = betas[share.adapter]
        for pair in share.examples:
            assert isinstance(pair, PreferencePair)
            with adapters[share.adapter].alone():
                # TRL's names and formula (loss_type "sigmoid").
                policy = [log_probability(model, row) for row in pair.rows]
            with torch.no_grad():
                reference = [log_probability(untouched, row) for row in pair.rows]
            chosen_logratios = policy[0] - reference[0]
            rejected_logratios = policy[1] - reference[1]
            one = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
            expected = expected + share.weight * one
            expected_each.append(one.item())
            margins.append((beta * (chosen_logratios - rejected_logratios)).item())
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each, torch.tensor(expected_each), rtol=1e-4, atol=1e-5)
    assert max(map(abs, margins)) > 0.01  # the adapters do differ from the base
    for ours, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=1e-5 + 1e-4 * float(theirs.abs().max())
        )

    first = dpo.take_figures(0)
    assert first["reward_margin"] == pytest.approx(sum(margins[:5]) / 5, abs=1e-4)
    assert first["reward_accuracy"] == sum(m > 0 for m in margins[:5]) / 5
    assert dpo.take_figures(0) == {}
    dpo(dpo.collate(shares, 0))
    run: Any = SimpleNamespace(adapter=adapters[0])
    PreferenceFigures(dpo).shrunk([run])  # all of it will be computed again
    dpo(dpo.collate(shares, 0))
    assert dpo.take_figures(0) == first


def test_training_learns_to_prefer(
    llama: Path, configure: Configure, write_rows: WriteRows, preferences: Rows
) -> None:
    data = DataConfig(write_rows(preferences), eval_file=write_rows(preferences, "eval.jsonl"))
    loop = LoopConfig(max_steps=15, batch_size=4, eval_every=5)
    seen: list[dict[str, float]] = []

    class Watching(Console):
        def evaluated(self, run: Any, when: str) -> None:
            seen.append(dict(run.eval_figures))

    config = configure(llama, data, loop=loop, objective=DPO)
    result = train(config, Watching(io.StringIO()))
    losses = result.record.eval_losses
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the adapter is the base yet
    assert losses[-1] < 0.5 * losses[0]
    assert seen[0] == {"reward_margin": pytest.approx(0, abs=1e-5), "reward_accuracy": 0}
    assert seen[-1]["reward_margin"] > 0.5
    assert seen[-1]["reward_accuracy"] == 1
    assert result.directory is not None


def test_adapters_at_once_learn_what_each_learns_alone(
    llama: Path, configure: Configure, write_rows: WriteRows, preferences: Rows
) -> None:
    data = write_rows(preferences)
    configs = [
        configure(
            llama,
            data,
            out=f"{i}",
            name=f"{i}",
            objective=ObjectiveConfig(name="dpo", beta=beta),
            lora=InjectionConfig(r=2 + i),
            loop=LoopConfig(max_steps=3, batch_size=4, seed=i),
        )
        for i, beta in enumerate((0.1, 0.5))
    ]
    together = train_all(configs, silent())
    for config, result in zip(configs, together, strict=True):
        alone = train(config, silent())
        for name, tensor in alone.adapter.tensors(torch.float32).items():
            torch.testing.assert_close(
                result.adapter.tensors(torch.float32)[name], tensor, rtol=1e-3, atol=1e-5
            )


def test_a_sweep_over_beta_in_a_file_with_layers_computed_again(
    llama: Path,
    tmp_path: Path,
    write_rows: WriteRows,
    preferences: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good
    file = tmp_path / "sweep.yaml"
    out = tmp_path / "sweep"
    file.write_text(
        f"model: {llama}\ndata: {write_rows(preferences)}\nout: {out}\nobjective: dpo\n"
        "device: cpu\ndtype: float32\nmax_steps: 2\neval_split: 0.25\nlr: 1e-2\n"
        "adapters:\n- {name: a, beta: 0.1, portable: true}\n- {name: b, beta: 0.5}\n"
    )
    assert main(["--config", str(file)]) == 0
    plain = read(out / "b").tensors
    assert {"log.jsonl", "report.html"} <= {path.name for path in (out / "a").iterdir()}
    assert main(["--config", str(file), "--checkpointing"]) == 0
    for name, tensor in read(out / "b").tensors.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)


def test_two_objectives_at_once_are_refused(
    llama: Path, configure: Configure, write_rows: WriteRows, preferences: Rows
) -> None:
    data = write_rows(preferences)
    configs = [
        configure(llama, data, out="a", name="a", objective=DPO),
        configure(llama, data, out="b", name="b"),
    ]
    with pytest.raises(TrainingError, match="a has --objective dpo, b has --objective sft"):
        train_all(configs, silent())


def test_the_flags() -> None:
    flags = ["--data", "d", "--out", "o", "--objective", "dpo", "--beta", "0.3"]
    assert parse(flags).objective == ObjectiveConfig(name="dpo", beta=0.3)
    with pytest.raises(TrainingError, match="--beta must be a number above 0"):
        parse([*flags, "--beta", "0"])
    with pytest.raises(TrainingError, match="--loss and --objective dpo exclude each other"):
        parse([*flags, "--loss", "a:b"])


def test_messages_need_a_chat_template_here_too(
    llama: Path, tmp_path: Path, configure: Configure, write_rows: WriteRows
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in llama.iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}]
    with pytest.raises(TrainingError, match="has no chat template"):
        train(configure(model, write_rows(rows), objective=DPO), silent())
