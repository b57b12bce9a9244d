"""Text from a model as it comes, cut at stop sequences: the trainer's own, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lorax_serve.errors import TrainingError
from lorax_train.data.tokenizer import Tokenizer

__all__ = ["Generated", "Sampling", "generate"]

_REPLACEMENT = "\ufffd"  # the end of a text whose last character is not whole yet


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The fields mean what the flags of ``lorax generate`` do."""

    max_new_tokens: int = 256
    temperature: float | None = None
    """0 is greedy; None: 1 with ``top_k`` or ``top_p``, else 0."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float | None = None
    """Keep the most probable tokens up to this mass."""
    seed: int | None = None
    """Repeats a draw; None: another one each time."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of all tokens so far
    (arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation, and are not a part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TrainingError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.chosen_temperature <= 100:
            raise TrainingError(f"--temperature must be within 0 and 100, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise TrainingError(f"--top-k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise TrainingError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty <= 100:
            raise TrainingError(
                f"--repetition-penalty must be above 0 and at most 100, not "
                f"{self.repetition_penalty}"
            )
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise TrainingError(f"--seed must be within 0 and 2**63, not {self.seed}")
        if not all(self.stop):
            raise TrainingError("--stop must not be empty")

    @property
    def chosen_temperature(self) -> float:
        """The temperature as it is applied."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.top_k is None and self.top_p is None else 1.0


@dataclass(slots=True)
class Generated:
    """What has come so far.

    Attributes:
        tokens: ids after the prompt.
        reason: why it ended: ``eos``, ``length`` or ``stop``.
    """

    tokens: list[int]
    reason: str = ""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    show: Callable[[str], None],
) -> Generated:
    """Generate after ``prompt``, and show the text as whole characters of it come.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        show: is given each new piece of the text.

    Raises:
        TrainingError: the prompt is empty, or a logit is not a number.
    """
    if not prompt:
        raise TrainingError("the prompt is empty; give at least one token")
    done, shown = Generated([]), ""
    for token in _tokens(model, prompt, sampling):
        if token in tokenizer.stop_ids:
            done.reason = "eos"
            break
        done.tokens.append(token)
        text = _text(tokenizer, done.tokens)
        ends = [text.find(stop) for stop in sampling.stop if stop in text]
        if ends:
            text, done.reason = text[: min(ends)], "stop"
        ready = text if ends else text[: len(text) - _held_back(text, sampling.stop)]
        show(ready[len(shown) :])
        shown = max(shown, ready, key=len)
        if ends:
            return done
    else:
        done.reason = "length"
    show(_text(tokenizer, done.tokens)[len(shown) :])
    return done


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return str(tokenizer.hf.decode(list(tokens), skip_special_tokens=True))


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end are not sure yet."""
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    broken = len(text) - len(text.rstrip(_REPLACEMENT))
    return max([broken, *begun])


def _tokens(model: PreTrainedModel, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    seen = list(prompt)
    ids, cache = torch.tensor([seen]), None
    for _ in range(sampling.max_new_tokens):
        out = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = _choose(out.logits[0, -1].float().cpu(), seen, sampling, generator)
        yield token
        seen.append(token)
        ids = torch.tensor([[token]])


def _choose(
    logits: torch.Tensor, seen: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """The next token, given logits ``[vocabulary]`` in float32."""
    if not bool(logits.isfinite().all()):
        raise TrainingError("a logit is not a finite number; try --dtype float32")
    if sampling.repetition_penalty != 1:
        ids = torch.tensor(sorted(set(seen)))
        own = logits[ids]
        penalty = sampling.repetition_penalty
        logits[ids] = torch.where(own > 0, own / penalty, own * penalty)
    if sampling.chosen_temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits / sampling.chosen_temperature, 0)
    sorted_chances, order = chances.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_chances[sampling.top_k :] = 0
        sorted_chances /= sorted_chances.sum()
    if sampling.top_p is not None:  # what comes before a token is less than the mass: it is kept
        before = sorted_chances.cumsum(0) - sorted_chances
        sorted_chances[before >= sampling.top_p] = 0
    return int(order[sorted_chances.multinomial(1, generator=generator)])
