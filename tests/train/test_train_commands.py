"""``lorax-train inspect`` and ``generate``: what they print, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import CONFIG_FILE, read, save
from lorax_serve.adapter.probe import Probe
from lorax_train.adapters.generation import Sampling, generate
from lorax_train.cli import main
from lorax_train.commands import COMMANDS
from lorax_train.data.tokenizer import load_tokenizer

MakeAdapter = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
PROBE = Probe((5, 6, 7, 8), ((9, 2.0), (10, 1.0)), (0.5, 1.0), 1.5, "ab" * 32, "float32")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


def error(argv: list[str], capsys: Capture) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"lorax-train {argv[0]}: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("word", sorted(COMMANDS))
def test_each_command_has_help_and_names_a_wrong_flag(word: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([word, "--help"])
    assert exit_.value.code == 0
    assert f"usage: lorax-train {word}" in capsys.readouterr().out
    said = error([word, "a", "b", "--out", "c", "--alpha", "1", "--model", "m", "--nope"], capsys)
    assert "unrecognized arguments" in said


def test_a_word_that_is_no_command_is_a_wrong_argument_of_training(capsys: Capture) -> None:
    assert main(["inspekt", "--data", "x", "--out", "y"]) == 2
    assert "unrecognized arguments: inspekt" in capsys.readouterr().err


def test_inspect_says_what_an_adapter_is(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter = make_adapter(
        "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 16}
    )
    files = read(adapter)
    facts = {"producer": "lorax-train 1.2", "steps": "40", "eval_loss": "1.25", "data_sha256": "f0"}
    save(adapter, files.config, files.tensors, facts | PROBE.to_metadata())
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    for line in (
        f"adapter      {adapter}",
        f"digest       {read(adapter).digest}",
        f"trained on   {tiny_model}",
        f"checked with {tiny_model}",
        "variants     lora",
        "config       r 4, alpha 8, targets q_proj, v_proj",
        "tensors      8, 3,712 numbers, float32",
        "modules      2 with rank 4, alpha 8, scale 2: q_proj",
        "modules      2 with rank 16, alpha 8, scale 0.5: v_proj",
        "producer     lorax-train 1.2",
        "steps        40",
        "eval_loss    1.25",
        "data_sha256  f0",
        f"probe        4 tokens in float32, moved by up to {PROBE.effect:.3g}; on the base with "
        "fingerprint abababababab",
        "it would be served",
    ):
        assert line in out.splitlines()


def test_inspect_ends_with_1_where_the_server_would_refuse(
    make_adapter: MakeAdapter, tiny_gpt2: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter = make_adapter("a", target_modules=["q_proj"])
    assert main(["inspect", str(adapter), "--model", str(tiny_gpt2)]) == 1
    out = capsys.readouterr().out
    assert "problem: target_modules ('q_proj') matches no linear module" in out
    assert out.endswith("it would be refused: no_match\n")
    (adapter / CONFIG_FILE).write_text("{")
    assert main(["inspect", str(adapter), "--model", str(tiny_gpt2)]) == 1
    out = capsys.readouterr().out
    assert "digest       none: the files could not be read" in out
    assert out.endswith("it would be refused: bad_config\n")
    assert main(["inspect", str(tmp_path / "nothing"), "--model", str(tiny_gpt2)]) == 1
    assert "problem: there is no adapter_config.json" in capsys.readouterr().out
    assert "no such directory" in error(["inspect", "a", "--model", "/nowhere"], capsys)


def test_greedy_text_is_that_of_base_and_adapter(
    make_adapter: MakeAdapter, tiny_model: Path, capsys: Capture
) -> None:
    adapter = make_adapter("a", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    argv = ["generate", str(adapter), "w5 w6 w7", "--max-new-tokens", "12", "-v"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(tiny_model, dtype=torch.float32)
    plain = base.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)
    model = PeftModel.from_pretrained(base, adapter)
    wanted = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)
    assert wanted.tolist() != plain.tolist()
    tokenizer = load_tokenizer("tiny", tiny_model, chat=False)
    assert captured.out == f"{tokenizer.hf.decode(wanted[0, 3:], skip_special_tokens=True)}\n"
    digest = read(adapter).digest[:12]
    assert captured.err == f"[{adapter}@{digest}; 3 + 12 tokens; length]\n"


def test_a_seed_repeats_a_draw_and_settings_change_it(
    make_adapter: MakeAdapter, capsys: Capture
) -> None:
    adapter = make_adapter("a", target_modules=["q_proj"])

    def text(*flags: str) -> str:
        argv = ["generate", str(adapter), "w5 w6", "--max-new-tokens", "16", *flags]
        assert main(argv) == 0
        return capsys.readouterr().out

    greedy, drawn = text(), text("--temperature", "2", "--seed", "1")
    assert drawn == text("--temperature", "2", "--seed", "1")
    assert drawn != text("--temperature", "2", "--seed", "2")
    assert text("--top-k", "1") == greedy == text("--top-p", "1e-6")
    assert text("--repetition-penalty", "100") != greedy
    assert text("--chat") != greedy


def test_a_stop_text_ends_it_and_is_no_part_of_it(
    make_adapter: MakeAdapter, capsys: Capture
) -> None:
    adapter = make_adapter("a", target_modules=["q_proj"])
    argv = ["generate", str(adapter), "w5 w6 w7", "--max-new-tokens", "12"]
    assert main(argv) == 0
    words = capsys.readouterr().out.split()
    stop = " ".join(words[3:5])
    assert main([*argv, "--stop", stop, "-v"]) == 0
    captured = capsys.readouterr()
    assert captured.out == " ".join(words).partition(stop)[0] + "\n"
    assert captured.err.endswith("; stop]\n")


def test_text_comes_in_whole_characters_and_pieces(llama: Path) -> None:
    tokenizer = load_tokenizer("tiny", llama, chat=False)
    letters = tokenizer.encode("aé€ [END] b", special=False)

    class Fixed(torch.nn.Module):
        """Says the letters, whatever it is asked."""

        device = torch.device("cpu")

        def forward(self, past_key_values: int | None, **_: object) -> Any:
            at = past_key_values or 0
            logits = torch.nn.functional.one_hot(torch.tensor(letters[at]), 264).float()

            class Out:
                pass

            out: Any = Out()
            out.logits, out.past_key_values = logits[None, None], at + 1
            return out

    pieces: list[str] = []
    model: Any = Fixed()
    done = generate(model, tokenizer, [1], Sampling(len(letters), stop=("[END]",)), pieces.append)
    assert (done.reason, "".join(pieces)) == ("stop", "aé€ ")
    assert {piece for piece in pieces if piece} == {"a", "é", "€", " "}
    pieces.clear()
    assert generate(model, tokenizer, [1], Sampling(9, stop=("[END]x",)), pieces.append)
    assert "".join(pieces) == "aé€ [E"  # what might have been a stop text, at the end


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["--temperature", "-1"], "--temperature must be within 0 and 100, not -1.0"),
        (["--temperature", "nan"], "--temperature must be within 0 and 100, not nan"),
        (["--top-k", "0"], "--top-k must be at least 1, not 0"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, not 0.0"),
        (["--top-p", "1.5"], "--top-p must be above 0 and at most 1, not 1.5"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
        (["--seed", "-1"], "--seed must be within 0 and 2**63"),
        (["--stop", ""], "--stop must not be empty"),
        (["--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
    ],
)
def test_a_bad_sampling_flag_is_named(flags: list[str], message: str, capsys: Capture) -> None:
    assert message in error(["generate", "nowhere", "w5", *flags], capsys)


def test_what_cannot_be_tried_is_refused_with_the_reason(
    make_adapter: MakeAdapter, capsys: Capture
) -> None:
    adapter = make_adapter("a", target_modules=["q_proj"], alora_invocation_tokens=[9])
    assert "is an activated LoRA" in error(["generate", str(adapter), "w5"], capsys)
    adapter = make_adapter("b", target_modules=["q_proj"])
    assert "the prompt is empty" in error(["generate", str(adapter), ""], capsys)
    raw = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(raw | {"peft_type": "LOHA"}))
    assert "peft_type='LOHA'" in error(["generate", str(adapter), "w5"], capsys)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_bias_is_tried_where_the_base_has_no_bias(
    make_adapter: MakeAdapter, tiny_model: Path, capsys: Capture
) -> None:
    adapter = make_adapter("a", target_modules=["q_proj", "up_proj"], lora_bias=True)
    assert main(["generate", str(adapter), "w5 w6", "--max-new-tokens", "8"]) == 0
    auto: Any = AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(tiny_model), adapter)
    wanted = model.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)[0, 2:]
    tokenizer = load_tokenizer("tiny", tiny_model, chat=False)
    said = tokenizer.hf.decode(wanted, skip_special_tokens=True)
    assert capsys.readouterr().out == f"{said}\n"
