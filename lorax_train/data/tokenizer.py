"""The base model's tokenizer, and what the trainer must know of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorax_serve.errors import TrainingError

__all__ = ["Tokenizer", "load_tokenizer"]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A Hugging Face tokenizer, and what the trainer must know of it.

    Attributes:
        hf: the tokenizer.
        eos_id: the token that ends what is learned.
        stop_ids: every token at which generation stops: ``eos_id`` and the generation config's.
        pad_id: fills up short rows; any token does, because the padding is masked by position.
    """

    hf: PreTrainedTokenizerBase
    eos_id: int
    stop_ids: frozenset[int]
    pad_id: int

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around a prompt."""
        # verbose warns of more tokens than the model has positions, which check_fit refuses.
        ids: list[int] = self.hf(text, add_special_tokens=special, verbose=False)["input_ids"]
        return list(ids)

    def render(
        self,
        messages: Sequence[tuple[str, str]],
        *,
        answer: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of (role, content) messages; ``answer`` opens the assistant's next turn, and
        ``tools`` are described to the model if the template does so."""
        text = self.hf.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=answer,
        )
        return self.encode(str(text), special=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones included."""
        return str(self.hf.decode(list(tokens), skip_special_tokens=False))


def load_tokenizer(spec: str, directory: Path, *, chat: bool) -> Tokenizer:
    """Load the tokenizer in ``directory``; ``chat`` if rows of messages are to be rendered.

    Raises:
        TrainingError: when it cannot be read, has no EOS token, or no chat template for ``chat``.
    """
    try:
        hf = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrainingError(f"model {spec}: its tokenizer cannot be loaded: {error}") from error
    if hf.eos_token_id is None:
        raise TrainingError(
            f"model {spec}: its tokenizer has no EOS token, so an adapter could not learn to stop; "
            "set eos_token in tokenizer_config.json"
        )
    if chat and not hf.chat_template:
        raise TrainingError(
            f"model {spec}: its tokenizer has no chat template, so rows of messages cannot be "
            "rendered; use prompt and completion rows"
        )
    pad = hf.eos_token_id if hf.pad_token_id is None else hf.pad_token_id
    return Tokenizer(hf, hf.eos_token_id, _stop_ids(directory) | {hf.eos_token_id}, pad)


def _stop_ids(directory: Path) -> frozenset[int]:
    """The EOS ids of ``generation_config.json``, where chat models list their end of turn."""
    file = directory / "generation_config.json"
    ids = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else None
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
