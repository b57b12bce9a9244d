"""The golden probe: written and read back as it was, and a check that says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_serve.adapter.probe import PROBE_KEY, Outcome, Probe, check
from lorax_serve.errors import AdapterRejected, RejectReason

HASH = "0123456789abcdef" * 4
# float32 may differ by 0.1, bfloat16 by 2.
TUNED = tuple(float(20 - i) for i in range(16))
BASE = tuple(float((7 * i) % 16) for i in range(16))
PROBE = Probe((5, 6, 7, 8), tuple(zip(range(16), TUNED, strict=True)), BASE, 5.0, HASH, "float32")

IDS = st.integers(0, (1 << 31) - 1)
LOGITS = st.floats(-1e9, 1e9)


@st.composite
def probes(draw: st.DrawFn) -> Probe:
    ids = draw(st.lists(IDS, min_size=2, max_size=16, unique=True))
    lists = st.lists(LOGITS, min_size=len(ids), max_size=len(ids))
    return Probe(
        token_ids=tuple(draw(st.lists(IDS, min_size=4, max_size=32))),
        top=tuple(zip(ids, draw(lists), strict=True)),
        base=tuple(draw(lists)),
        scale=draw(st.floats(1e-9, 1e9)),
        base_fingerprint=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(probe=probes())
def test_what_is_written_is_read(probe: Probe) -> None:
    metadata = probe.to_metadata()
    assert list(metadata) == [PROBE_KEY]
    assert Probe.from_metadata({"format": "pt", **metadata}) == probe


def test_an_adapter_need_not_have_one() -> None:
    assert Probe.from_metadata({"format": "pt"}) is None


def rejection(text: str) -> AdapterRejected:
    with pytest.raises(AdapterRejected, match=r"lorax\.probe in the weights file's header") as got:
        Probe.from_metadata({PROBE_KEY: text})
    return got.value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 10_000, "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "base is missing"),
    ],
)
def test_what_is_no_probe_is_refused(text: str, why: str) -> None:
    error = rejection(text)
    assert error.reason is RejectReason.BAD_FILE
    assert why in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", [1, 2, 3]),
        ("token_ids", [1] * 33),
        ("token_ids", [1, 2, 3, True]),
        ("token_ids", [1, 2, 3, -1]),
        ("token_ids", [1, 2, 3, 1 << 31]),
        ("token_ids", "1234"),
        ("top", []),
        ("top", [[1, 1.0]]),
        ("top", [[i, 1.0] for i in range(17)]),
        ("top", [[1, 1.0]] * 16),
        ("top", [[i, math.nan] for i in range(16)]),
        ("top", [[i] for i in range(16)]),
        ("top", [[1.5, 1.0], *([i, 1.0] for i in range(15))]),
        ("base", [1.0] * 15),
        ("base", [math.inf] * 16),
        ("base", [10**400] * 16),
        ("base", ["1.0"] * 16),
        ("scale", 0),
        ("scale", math.nan),
        ("scale", "5"),
        ("base_fingerprint", "abc"),
        ("base_fingerprint", None),
        ("dtype", "float64"),
        ("dtype", ["float32"]),
        ("version", 0),
        ("version", True),
        ("version", "1"),
        ("surprise", 1),
    ],
)
def test_a_malformed_field_is_named(field: str, value: Any) -> None:
    raw = json.loads(PROBE.to_metadata()[PROBE_KEY]) | {field: value}
    error = rejection(json.dumps(raw))
    assert error.reason is RejectReason.BAD_FILE
    assert f"{field} " in str(error)


def test_a_later_version_is_said_to_be_one() -> None:
    error = rejection(json.dumps({"version": 2, "surprise": 1}))
    assert error.reason is RejectReason.UNSUPPORTED
    assert "a newer lorax-serve reads it" in str(error)


def moved(logits: tuple[float, ...], by: float) -> list[float]:
    return [*logits[:3], logits[3] + by, *logits[4:]]


def test_the_same_logits_pass_whatever_they_have_in_common() -> None:
    for common in (0.0, 5.0):
        tuned, base = ([logit + common for logit in logits] for logits in (TUNED, BASE))
        result = check(PROBE, tuned, base, HASH, "float32")
        assert result.passed
        assert (result.outcome, result.message, result.warnings) == (Outcome.PASSED, "", ())
        assert result.difference == pytest.approx(0.0, abs=1e-9)
        assert result.effect == PROBE.effect > 5


@pytest.mark.parametrize(
    ("trained", "served", "within", "beyond"),
    [
        ("float32", "float32", 0.1, 0.12),
        ("float32", "bfloat16", 2.0, 2.2),
        ("bfloat16", "float32", 2.0, 2.2),
        ("float32", "float16", 2.0, 2.2),
    ],
)
def test_the_tolerance_is_that_of_the_coarser_dtype(
    trained: str, served: str, within: float, beyond: float
) -> None:
    probe = dataclasses.replace(PROBE, dtype=trained)
    assert check(probe, moved(TUNED, within), list(BASE), HASH, served).passed
    result = check(probe, moved(TUNED, beyond), list(BASE), HASH, served)
    assert result.outcome is Outcome.WRONG_ADAPTER
    assert result.difference == pytest.approx(beyond * 15 / 16)
    assert result.difference > result.tolerance == probe.tolerance(served)
    assert f"({served} here, {trained} where it was trained)" in result.message
    assert "lora_alpha" in result.message


def test_a_wrong_base_is_told_from_a_wrong_adapter() -> None:
    base = moved(BASE, 3.0)
    result = check(PROBE, moved(TUNED, 1.0), base, HASH[::-1], "float32")
    assert (result.outcome, result.passed) == (Outcome.WRONG_BASE, False)
    assert result.difference == pytest.approx(3.0 * 15 / 16)
    assert "its weights are others" in result.message
    result = check(PROBE, list(TUNED), base, HASH, "float32")
    assert result.outcome is Outcome.WRONG_BASE
    assert "config.json (RoPE, norms) may differ" in result.message


def test_other_weights_that_answer_the_same_are_a_warning() -> None:
    result = check(PROBE, list(TUNED), list(BASE), HASH[::-1], "float32")
    assert result.passed
    assert len(result.warnings) == 1
    assert "fingerprint fedcba987654, not 0123456789ab" in result.warnings[0]


def test_an_effect_that_the_tolerance_hides_is_a_warning() -> None:
    weak = dataclasses.replace(PROBE, base=tuple(moved(TUNED, 1.0)))
    assert check(weak, list(TUNED), moved(TUNED, 1.0), HASH, "float32").warnings == ()
    result = check(weak, list(TUNED), moved(TUNED, 1.0), HASH, "bfloat16")
    assert result.passed
    assert len(result.warnings) == 1
    assert "a wrong scale would not be seen" in result.warnings[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_does_not_pass(bad: float) -> None:
    outcome = check(PROBE, moved(TUNED, bad), list(BASE), HASH, "bfloat16").outcome
    assert outcome is Outcome.WRONG_ADAPTER
    outcome = check(PROBE, list(TUNED), moved(BASE, bad), HASH, "bfloat16").outcome
    assert outcome is Outcome.WRONG_BASE
