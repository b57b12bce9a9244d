"""What calls return: plain frozen data, made from response messages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from lorax_serve.core import StopReason
from lorax_serve.pb.lorax.v1 import adapter_pb2
from lorax_serve.report import LoadReport, ModuleReport, ProbeOutcome, ProbeReport, RejectReason

__all__ = [
    "Adapter",
    "AdapterEvent",
    "AppliedAdapter",
    "FailedAdapter",
    "Generation",
    "Model",
    "Token",
    "Tokens",
    "TopToken",
    "load_report",
]


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most probable tokens at a place."""

    id: int
    piece: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        piece: its spelling in the vocabulary, not always whole characters.
        logprob: natural logarithm of its probability in the model's own distribution.
        top: the most probable tokens at its place.
    """

    id: int
    piece: str
    logprob: float | None
    top: tuple[TopToken, ...]


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One of several adapters that were applied together.

    Attributes:
        version: the sequence number of its load on that server.
        digest: SHA-256 of its files.
        scale: what its change of the base was multiplied by.
    """

    name: str
    version: int
    digest: str
    scale: float


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text or, while streaming, a piece of one.

    Attributes:
        text: the text; while streaming, what is new.
        tokens: the tokens, if they were asked for; while streaming, the new ones.
        stop_reason: ``NOT_FINISHED`` in all pieces but the last.
        stop_sequence: the one that ended it, if one did.
        generated_token_count: tokens generated, so far while streaming.
        input_token_count: tokens of the prompt.
        seed: the seed in use: the same request with it gives the same text.
        adapter: the adapter that was applied; None is the base model, or several ``adapters``.
        adapter_version: the sequence number of its load on that server.
        adapter_digest: SHA-256 of its files.
        adapters: those that were applied together, in the order of the request.
    """

    text: str
    tokens: tuple[Token, ...]
    stop_reason: StopReason
    stop_sequence: str | None
    generated_token_count: int
    input_token_count: int
    seed: int
    adapter: str | None
    adapter_version: int | None
    adapter_digest: str | None
    adapters: tuple[AppliedAdapter, ...] = ()

    @classmethod
    def of(cls, message: Any, first: Generation | None = None) -> Generation:
        """The content of a response; later messages of a stream repeat the ``first`` one's
        provenance."""
        piece = cls(
            text=message.text,
            tokens=tuple(_token(each) for each in message.tokens),
            stop_reason=StopReason(message.stop_reason),
            stop_sequence=_optional(message, "stop_sequence"),
            generated_token_count=message.generated_token_count,
            input_token_count=message.input_token_count,
            seed=message.seed,
            adapter=_optional(message, "adapter_id"),
            adapter_version=_optional(message, "adapter_version"),
            adapter_digest=_optional(message, "adapter_digest"),
            adapters=tuple(
                AppliedAdapter(each.adapter_id, each.version, each.digest, each.scale)
                for each in message.adapters
            ),
        )
        if first is None:
            return piece
        return replace(
            first,
            text=piece.text,
            tokens=piece.tokens,
            stop_reason=piece.stop_reason,
            stop_sequence=piece.stop_sequence,
            generated_token_count=piece.generated_token_count,
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt: ids and their spellings in the vocabulary."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, message: Any) -> Tokens:
        """The content of a response."""
        return cls(tuple(message.token_ids), tuple(message.tokens))


@dataclass(frozen=True, slots=True)
class Model:
    """The base model of a server."""

    model: str
    dtype: str
    device: str
    vocab_size: int
    max_sequence_length: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    server_version: str

    @classmethod
    def of(cls, message: Any) -> Model:
        """The content of a response."""
        return cls(
            model=message.model,
            dtype=message.dtype,
            device=message.device,
            vocab_size=message.vocab_size,
            max_sequence_length=message.max_sequence_length,
            eos_token_ids=tuple(message.eos_token_ids),
            num_parameters=message.num_parameters,
            server_version=message.server_version,
        )


@dataclass(frozen=True, slots=True)
class Adapter:
    """One loaded version of an adapter.

    Attributes:
        version: the sequence number of its load on that server.
        digest: SHA-256 of its files.
        state: ``ready``; ``superseded`` if its name means another version now, ``draining`` once it
            is unloaded or replaced for good.
        rank: the largest of its modules.
        module_count: modules of the base model that it changes.
        host_bytes: host memory that it takes.
        last_used: when the last request started with it, else when it was loaded.
        weight: its share of a busy server.
        pinned: whether its weights never leave host memory.
        tier: where its weights are: ``device``, ``host`` or ``disk``; None where that is not told.
        report: what the load has found, without lists of modules and tensors; only in the answer
            to the load.
    """

    name: str
    version: int
    digest: str
    state: str
    rank: int
    module_count: int
    host_bytes: int
    active_requests: int
    total_requests: int
    last_used: datetime
    weight: int
    pinned: bool = False
    tier: str | None = field(default=None, compare=False)
    report: LoadReport | None = field(default=None, compare=False)

    @classmethod
    def of(cls, message: Any, report: LoadReport | None = None) -> Adapter:
        """The content of a message, and of the report that came with it."""
        state = adapter_pb2.AdapterState.Name(message.state)
        return cls(
            name=message.adapter_id,
            version=message.version,
            digest=message.digest,
            state=state.removeprefix("ADAPTER_STATE_").lower(),
            rank=message.rank,
            module_count=message.module_count,
            host_bytes=message.host_bytes,
            active_requests=message.active_requests,
            total_requests=message.total_requests,
            last_used=message.last_used.ToDatetime(tzinfo=UTC),
            weight=message.weight,
            pinned=message.pinned,
            tier=_word(adapter_pb2.AdapterTier, message.tier),
            report=report,
        )

    @classmethod
    def loaded(cls, response: Any) -> Adapter:
        """The content of the response to a load; an older server's has no report."""
        report = load_report(response.report) if response.HasField("report") else None
        return cls.of(response.adapter, report)


@dataclass(frozen=True, slots=True)
class FailedAdapter:
    """An adapter that a server should serve by its source or manifest, and could not load.

    Attributes:
        name: of the adapter, or of the source or file that could not be read.
        message: why not.
        reason: the class of that, if it has one.
    """

    name: str
    message: str
    reason: str

    @classmethod
    def of(cls, message: Any) -> FailedAdapter:
        """The content of a message."""
        return cls(message.adapter_id, message.message, message.reason)


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One change on a server.

    Attributes:
        kind: ``present`` (it was there when the watch began), ``synced`` (all that was there has
            been told), ``loaded``, ``changed`` (its state, weight or pin), ``unloaded`` or
            ``refused`` (a load has failed).
        name: of the adapter; empty with ``synced``.
        adapter: as it was then; None with ``synced`` and ``refused``.
        message: why a load failed.
        reason: the class of that, if it has one.
    """

    kind: str
    name: str
    adapter: Adapter | None
    message: str
    reason: str

    @classmethod
    def of(cls, message: Any) -> AdapterEvent:
        """The content of a message."""
        return cls(
            kind=_word(adapter_pb2.AdapterEvent, message.event) or "unknown",
            name=message.adapter_id,
            adapter=Adapter.of(message.adapter) if message.HasField("adapter") else None,
            message=message.message,
            reason=message.reason,
        )


def load_report(message: Any) -> LoadReport:
    """The content of a ``LoadReport`` message."""
    probe = message.probe
    outcome = adapter_pb2.ProbeOutcome.Name(probe.outcome).removeprefix("PROBE_OUTCOME_").lower()
    return LoadReport(
        digest=message.digest,
        base_model=message.base_model,
        variants=tuple(message.variants),
        modules=tuple(
            ModuleReport(each.path, each.kind, each.rank, each.alpha, each.scale)
            for each in message.modules
        ),
        matched=tuple(message.matched),
        unmatched=tuple(message.unmatched),
        missing=tuple(message.missing),
        num_modules=message.module_count,
        num_matched=message.matched_count,
        num_unmatched=message.unmatched_count,
        num_missing=message.missing_count,
        file_bytes=message.file_bytes,
        host_bytes=message.host_bytes,
        warnings=tuple(message.warnings),
        probe=ProbeReport(
            ProbeOutcome.NONE if outcome == "unspecified" else ProbeOutcome(outcome),
            probe.difference,
            probe.tolerance,
            probe.effect,
            probe.message,
        ),
        reason=_reason(message.reject_reason) if message.HasField("reject_reason") else None,
        problems=tuple(message.problems),
    )


def _word(enum: Any, number: int) -> str | None:
    """An enum's value in lower case, without its prefix; None if it is unspecified or newer."""
    if number == 0 or number not in enum.values():
        return None
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    name: str = enum.Name(number)
    return name.removeprefix(prefix).lower()


def _reason(word: str) -> RejectReason:
    # A newer server's reason is still a refusal; the problems say which.
    return RejectReason(word) if word in list(RejectReason) else RejectReason.UNSUPPORTED


def _token(message: Any) -> Token:
    top = tuple(TopToken(each.id, each.piece, each.logprob) for each in message.top)
    return Token(message.id, message.piece, _optional(message, "logprob"), top)


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
