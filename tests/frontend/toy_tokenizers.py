"""Tokenizers made on the spot: one of words, two of bytes."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
EOS = SPECIAL.index("</s>")
WORDS = (
    *SPECIAL,
    *("system", "user", "assistant"),
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("stop", "here"),
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


def save_word_tokenizer(directory: Path, *, chat: bool = True) -> Path:
    """A tokenizer of ``WORDS``; the token ids are their places."""
    backend = Backend(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _save(backend, directory, CHAT_TEMPLATE if chat else None)


def save_byte_tokenizer(directory: Path) -> Path:
    """A tokenizer whose tokens are single bytes, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    backend = Backend(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _save(backend, directory, None)


def save_fallback_tokenizer(directory: Path) -> Path:
    """Letters, and bytes for all else, as Llama 2's and Mistral's: the decoder joins bytes that
    follow each other, and can read either all of them or none."""
    letters = [chr(code) for code in range(32, 127)]
    tokens = (*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(
        models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=False)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _save(backend, directory, None)


def _save(backend: Backend, directory: Path, chat_template: str | None) -> Path:
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory
