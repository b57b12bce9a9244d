"""A run's data, from files to examples that fit the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

from lorax_serve.errors import TrainingError
from lorax_train.config import DataConfig, TrainConfig
from lorax_train.data.batches import split
from lorax_train.data.content import is_chat
from lorax_train.data.encode import Encoder, Example
from lorax_train.data.preference import PreferenceEncoder
from lorax_train.data.rows import find_files, place, read_rows, read_text
from lorax_train.data.token_store import StoredExamples, StoreWriter, TokenStore, open_store
from lorax_train.data.tokenizer import Tokenizer, load_tokenizer
from lorax_train.data.windows import held_out_windows, random_windows

__all__ = ["Dataset", "check_files", "prepare"]

# To be raised whenever the same data and settings give other tokens, or the store another layout.
_CACHE_VERSION = 2


@dataclass(frozen=True)
class Dataset:
    """What an adapter is trained and evaluated on.

    Attributes:
        examples: to train on.
        held_out: to evaluate on; may be empty.
        tokenizer: of the base model.
        sha256: of the training file; of several, of their digests one after another.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]
    tokenizer: Tokenizer
    sha256: str


def check_files(data: DataConfig) -> None:
    """Make sure that the files are there, before anything is loaded.

    Raises:
        TrainingError: naming the file or directory.
    """
    for path in filter(None, (data.train, data.eval_file)):
        find_files(path)


def prepare(
    config: TrainConfig,
    source: Path,
    warn: Callable[[str], None],
    stores: dict[str, TokenStore] | None = None,
) -> Dataset:
    """Read and tokenise the rows.

    Args:
        config: says where they are.
        source: the base model's directory, which has the tokenizer.
        warn: is told what was cut or left out.
        stores: of other runs, so that the same rows are tokenised once; this one's are added.

    Raises:
        TrainingError: naming the file, line and flag.
    """
    return _Preparation(config, source, warn, {} if stores is None else stores).dataset()


@dataclass(frozen=True)
class _Files:
    """What ``--data`` or ``--eval-data`` names."""

    path: Path
    files: Sequence[Path]
    digests: Sequence[str]
    windows: bool
    chat: bool

    @property
    def sha256(self) -> str:
        if len(self.digests) == 1:
            return self.digests[0]
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def where(self, file: int, number: int) -> str:
        return place(self.files[file], number)


class _Preparation:
    def __init__(
        self,
        config: TrainConfig,
        source: Path,
        warn: Callable[[str], None],
        stores: dict[str, TokenStore],
    ) -> None:
        self._config = config
        self._warn = warn
        self._stores = stores
        data = config.data
        self._train = _look_at(data.train, data)
        self._eval = _look_at(data.eval_file, data) if data.eval_file else None
        for files in filter(None, (self._train, self._eval)):
            if files.windows and config.objective.name == "dpo":
                raise TrainingError(
                    f"{files.path}: --text-mode windows reads text, but --objective dpo needs rows "
                    "with prompt, chosen and rejected; leave one of the two flags out"
                )
        if self._eval is not None:
            self._check_apart(self._eval)
        chat = self._train.chat or (self._eval is not None and self._eval.chat)
        self._tokenizer = load_tokenizer(config.model, source, chat=chat)

    def dataset(self) -> Dataset:
        data, seed = self._config.data, self._config.loop.seed
        train = self._train
        share = data.held_out_share(windows=train.windows)
        store = self._open(train)
        examples: Sequence[Example]
        held_out: Sequence[Example] = []
        if train.windows:
            examples, rest = random_windows(store, train.path, share, data.window, seed)
            held_out = held_out if rest is None else rest
        else:
            examples = StoredExamples(store, train.where)
            if share:
                if len(examples) < 2:
                    raise TrainingError(
                        "--eval-split needs at least two rows that fit --max-length; give more, "
                        "or --eval-data"
                    )
                examples, held_out = split(examples, share, seed)
        if (evaluation := self._eval) is not None:
            store = self._open(evaluation)
            if evaluation.windows:
                held_out = held_out_windows(store, evaluation.path, data.window)
            else:
                held_out = StoredExamples(store, evaluation.where)
        if not held_out:  # as of rows, though --text-mode windows would hold out a tenth of text
            self._config.check_evaluation(f"none of {train.path} is held out")
        return Dataset(examples, held_out, self._tokenizer, train.sha256)

    def _check_apart(self, evaluation: _Files) -> None:
        """Held-out rows are not to be found in a directory to train on."""
        both = {file.resolve() for file in self._train.files} & {
            file.resolve() for file in evaluation.files
        }
        if both and self._train.path.is_dir():
            raise TrainingError(
                f"--eval-data {min(both)} is in --data {self._train.path} too, so it would be "
                "trained on; move one of them"
            )

    def _open(self, files: _Files) -> TokenStore:
        """The store of these files, made unless there is one; its warnings are shown once."""
        key = self._key(files)
        if key not in self._stores:
            cache = self._config.data.cache
            kept = None if cache is None else cache / key
            write = self._write_text if files.windows else self._write_rows
            store = open_store(lambda writer: write(files, writer), kept)
            for warning in store.warnings:
                self._warn(f"{files.path}: {warning}")
            self._stores[key] = store
        return self._stores[key]

    def _key(self, files: _Files) -> str:
        """A name for all that the tokens depend on."""
        hf = self._tokenizer.hf
        backend = getattr(hf, "backend_tokenizer", None)
        facts = (
            _CACHE_VERSION,
            transformers.__version__,
            [
                (file.suffix, digest)
                for file, digest in zip(files.files, files.digests, strict=True)
            ],
            "windows" if files.windows else self._config.data.text_mode,
            0 if files.windows else self._config.data.max_length,
            self._config.objective.name,
            sorted(hf.get_vocab().items()) if backend is None else backend.to_str(),
            [str(hf.chat_template), str(hf.init_kwargs)],
            [self._tokenizer.eos_id, *sorted(self._tokenizer.stop_ids)],
        )
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _write_rows(self, files: _Files, writer: StoreWriter) -> None:
        kind = PreferenceEncoder if self._config.objective.name == "dpo" else Encoder
        encoder = kind(self._tokenizer, self._config.data.max_length)
        for index, file in enumerate(files.files):
            for row in read_rows(file, self._config.data.text_mode):
                example = encoder.encode(row)
                if example is not None:
                    writer.add(example, index, row.number)
        try:
            writer.warnings += encoder.finish()
        except TrainingError as error:
            raise TrainingError(f"{files.path}: {error}") from error

    def _write_text(self, files: _Files, writer: StoreWriter) -> None:
        """Each file's text, and an EOS after it."""
        for index, file in enumerate(files.files):
            tokens = 0
            for text in read_text(file):
                piece = self._tokenizer.encode(text, special=False)
                if piece:
                    writer.add_text(piece, index, 0)
                tokens += len(piece)
            if not tokens:
                raise TrainingError(f"{file} holds no text; fill it or leave it out")
            writer.add_text([self._tokenizer.eos_id], index, 0)


def _look_at(path: Path, data: DataConfig) -> _Files:
    """Which files there are, in what format, and with what content.

    Raises:
        TrainingError: naming the file, when one is missing, empty, or begins with a bad row.
    """
    files = find_files(path)
    texts = [file for file in files if file.suffix == ".txt"]
    windows = data.text_mode == "windows" and bool(texts)
    if windows and len(texts) < len(files):
        other = next(file for file in files if file.suffix != ".txt")
        raise TrainingError(
            f"--text-mode windows reads .txt files alone, but there is {other}; move it, or choose "
            "--text-mode lines or file"
        )
    chat = False
    for file in files if not windows else ():
        chat |= is_chat(next(read_rows(file, data.text_mode)).content)
    return _Files(path, files, [_digest(file) for file in files], windows, chat)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
