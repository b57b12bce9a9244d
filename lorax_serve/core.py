"""The nouns that every layer shares. Plain data: no torch, no asyncio, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from lorax_serve.errors import InvalidRequest
from lorax_serve.report import LoadReport

__all__ = [
    "BASE",
    "NEVER",
    "PENDING",
    "AdapterInfo",
    "AdapterScale",
    "AdapterStats",
    "AdapterTier",
    "AdapterWork",
    "Batch",
    "CacheKey",
    "ChatMessage",
    "EngineStats",
    "Freed",
    "GenerateRequest",
    "ModelInfo",
    "Part",
    "RowCopy",
    "SamplingParams",
    "Sequence",
    "StopParams",
    "StopReason",
    "TokenOutput",
]

BASE = -1
"""The slot of rows without an adapter: the base model is not an adapter and takes no slot."""

PENDING = -1
"""In place of a token that is being computed, until the device has said which it is."""

NEVER = 1 << 62
"""A position that no sequence reaches."""

MAX_LOGPROBS = 20
MAX_PARTS = 8
MAX_PRIORITY = 2
MAX_SCALE = 100
MAX_STOP_SEQUENCES = 16
MAX_STOP_LENGTH = 256
_SEEDS = 1 << 64


def _check(ok: bool, field_name: str, need: str, value: object) -> None:
    if not ok:
        raise InvalidRequest(f"{field_name} must be {need}, found {value!r}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is drawn from the logits. Filters apply in the order of the fields.

    Raises:
        InvalidRequest: naming the first field that is out of range.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens already seen (prompt included) are divided by this if positive, else
    multiplied (arXiv:1909.05858). In [0.01, 100]; 1 switches it off."""
    temperature: float = 0.0
    """Logits are divided by it. 0 is greedy; at most 100."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose mass reaches it (arXiv:1904.09751).
    In (0, 1]."""
    seed: int = 0
    """The whole source of randomness of a request: same seed, same draws. In [0, 2**64)."""
    logprobs: int | None = None
    """None: no log-probabilities. n: those of the chosen token and of the n most probable ones,
    under the model's own distribution (before penalty, temperature and filters)."""

    def __post_init__(self) -> None:
        penalty, temperature = self.repetition_penalty, self.temperature
        _check(0.01 <= penalty <= 100, "repetition_penalty", "in [0.01, 100]", penalty)
        _check(0 <= temperature <= 100, "temperature", "in [0, 100] (0 is greedy)", temperature)
        # A denormal temperature would overflow the scaled logits.
        _check(temperature == 0 or temperature >= 1e-3, "temperature", "0 or >= 0.001", temperature)
        _check(self.top_k >= 0, "top_k", "0 (off) or more", self.top_k)
        _check(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _check(0 <= self.seed < _SEEDS, "seed", "in [0, 2**64)", self.seed)
        n = self.logprobs
        _check(n is None or 0 <= n <= MAX_LOGPROBS, "logprobs", f"in [0, {MAX_LOGPROBS}]", n)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without a draw."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class StopParams:
    """When a sequence ends.

    Raises:
        InvalidRequest: naming the first field that is out of range.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """EOS cannot be drawn, and stop sequences do not match, before this many tokens."""
    stop_sequences: tuple[str, ...] = ()
    include_stop_sequence: bool = False
    """Whether the text that is returned ends with the stop sequence that matched."""
    ignore_eos: bool = False
    """Go on past EOS; for benchmarks."""

    def __post_init__(self) -> None:
        most, least = self.max_new_tokens, self.min_new_tokens
        _check(most >= 1, "max_new_tokens", "at least 1", most)
        _check(0 <= least <= most, "min_new_tokens", "in [0, max_new_tokens]", least)
        stops = self.stop_sequences
        at_most = f"at most {MAX_STOP_SEQUENCES} strings"
        _check(len(stops) <= MAX_STOP_SEQUENCES, "stop_sequences", at_most, len(stops))
        for stop in stops:
            need = f"strings of 1 to {MAX_STOP_LENGTH} characters"
            _check(0 < len(stop) <= MAX_STOP_LENGTH, "stop_sequences", need, stop[:40])


class ChatMessage(NamedTuple):
    """One message of a chat prompt, rendered by the model's chat template."""

    role: str
    content: str


class AdapterScale(NamedTuple):
    """An adapter, and what its change of the base is multiplied by."""

    adapter_id: str
    scale: float = 1.0


class Part(NamedTuple):
    """A version in a composition, as the engine reads it; the name is for messages."""

    name: str
    path: str
    digest: str
    scale: float


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A validated request for text.

    Attributes:
        prompt: text, token ids, or chat messages.
        adapter_id: the adapter's name; None is the base model, or a composition.
        composition: adapters that are applied together, each with its scale.
        priority: in [-2, 2]; each level doubles the share of a busy server.

    Raises:
        InvalidRequest: the priority or a scale is out of range, an adapter is named twice, too many
            are, or both an adapter and a composition.
    """

    prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]
    adapter_id: str | None = None
    composition: tuple[AdapterScale, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: StopParams = field(default_factory=StopParams)
    priority: int = 0

    def __post_init__(self) -> None:
        most = MAX_PRIORITY
        _check(-most <= self.priority <= most, "priority", f"in [-{most}, {most}]", self.priority)
        if self.composition:
            alone = self.adapter_id is None
            _check(alone, "adapter_id", "left out beside adapters", self.adapter_id)
            names = [part.adapter_id for part in self.composition]
            _check(len(names) <= MAX_PARTS, "adapters", f"at most {MAX_PARTS}", len(names))
            for name, scale in self.composition:
                if names.count(name) > 1:
                    raise InvalidRequest(f"adapters: {name!r} is named twice; give it one scale")
                within = -MAX_SCALE <= scale <= MAX_SCALE
                need = f"in [-{MAX_SCALE}, {MAX_SCALE}]"
                _check(within, f"adapters: scale of {name!r}", need, scale)


class StopReason(Enum):
    """Why a sequence ended. Names and meanings as in TGIS."""

    NOT_FINISHED = 0
    MAX_TOKENS = 1
    """max_new_tokens was reached."""
    EOS_TOKEN = 2
    CANCELLED = 3
    """The client cancelled, went away, or its deadline passed."""
    STOP_SEQUENCE = 4
    TOKEN_LIMIT = 5
    """The server's maximum sequence length was reached."""
    ERROR = 6


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One step's result for one request. The last one has a ``stop_reason``.

    A token that ends a sequence (EOS) is reported too. ``token_id`` is None only with ERROR.
    """

    request_id: int
    token_id: int | None
    stop_reason: StopReason = StopReason.NOT_FINISHED
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str = ""
    queue_seconds: float | None = None
    """With the first token: how long the request waited for its first step."""


class CacheKey(NamedTuple):
    """What keys and values depend on beside the tokens.

    Attributes:
        digest: of the adapter's content.
        start: the first position that it acts on; those before are the base model's.
    """

    digest: str
    start: int = 0


@dataclass(slots=True)
class Sequence:
    """A request as the engine knows it: token ids and numbers.

    Attributes:
        tokens: the prompt, then what was generated; the last may be ``PENDING``.
        adapter: the adapter's version (the load's sequence number); None is the base model.
        computed: how many of ``tokens`` have their keys and values in the cache.
        kv_slot: its row of the KV cache, -1 while it waits.
        adapter_slot: its adapter's slot on the device, ``BASE`` without adapter or while it waits.
        adapter_start: the first position that its adapter acts on: 0, or where an activated LoRA's
            invocation begins, ``NEVER`` if the prompt has none.
        cache_key: None for the base model.
        priority: in [-2, 2]; each level doubles its flow's share.
        weight: its adapter's share.
        end: as many tokens as it may have.
        charged: how many of ``tokens`` its flow was charged for; more than ``computed`` while a
            preempted sequence is computed again.
        arrived: ``time.perf_counter`` at arrival.
        queue_seconds: from arrival to its first step.
    """

    request_id: int
    tokens: list[int]
    prompt_length: int
    adapter: int | None
    sampling: SamplingParams
    max_new_tokens: int
    min_new_tokens: int
    eos_token_ids: frozenset[int]
    computed: int = 0
    kv_slot: int = -1
    adapter_slot: int = BASE
    adapter_start: int = 0
    cache_key: CacheKey | None = None
    priority: int = 0
    weight: int = 1
    end: int = NEVER
    charged: int = 0
    arrived: float = 0.0
    queue_seconds: float | None = None

    @property
    def generated(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Number of tokens that the next step could compute: 1 when decoding."""
        return len(self.tokens) - self.computed

    @property
    def is_pending(self) -> bool:
        """Whether its last token is not known yet."""
        return self.tokens[-1] == PENDING

    def slot_at(self, position: int) -> int:
        """The adapter slot of one of its tokens."""
        return self.adapter_slot if position >= self.adapter_start else BASE


class RowCopy(NamedTuple):
    """Positions ``[0, length)`` of KV row ``source`` go to row ``destination``.

    ``source == destination`` frees the memory of the row's positions from ``length`` on.
    """

    source: int
    destination: int
    length: int


@dataclass(slots=True)
class Batch:
    """One step's work: one token for each of ``decodes``, a chunk for each of ``prefills``."""

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)
    """A sequence, and how many of its tokens to compute now, from ``computed`` on."""
    loads: list[tuple[int, int]] = field(default_factory=list)
    """Device slots, and the adapter versions to bring into them before the step."""
    copies: list[RowCopy] = field(default_factory=list)
    """What to move in the KV cache before the step, one after the other."""

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences of the step."""
        return self.decodes + [sequence for sequence, _ in self.prefills]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine reports of its base model when it is ready."""

    model: str
    directory: str
    dtype: str
    device: str
    vocab_size: int
    max_sequence_length: int
    max_batch_size: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    kv_cache_bytes: int


class AdapterTier(Enum):
    """The fastest place where an adapter's weights are."""

    DEVICE = "device"
    """In a slot, where batches find them; on a CPU that is host memory too."""
    HOST = "host"
    DISK = "disk"


class Freed(NamedTuple):
    """Bytes that an unload has freed, by tier."""

    host: int = 0
    device: int = 0
    """Beside the host's: 0 on a CPU."""
    disk: int = 0
    """Of the server's own copies, as far as nothing else needs them."""

    def plus(self, other: Freed) -> Freed:
        """The sum, tier by tier."""
        return Freed(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What the engine reports of an adapter that it has loaded.

    Attributes:
        digest: SHA-256 of the adapter's files.
        max_rank: the largest rank of any module.
        num_modules: how many modules it changes.
        nbytes: bytes that it takes in host memory.
        invocation_tokens: the last place where a prompt has them is where the adapter begins to act
            (aLoRA); empty: it acts on all tokens.
        report: what the load has found, without its lists.
    """

    digest: str
    max_rank: int
    num_modules: int
    nbytes: int
    invocation_tokens: tuple[int, ...] = ()
    report: LoadReport = field(default_factory=LoadReport, compare=False)

    def start_in(self, prompt: tuple[int, ...]) -> int:
        """The first position of a prompt that the adapter acts on; ``NEVER`` if it does not."""
        wanted = self.invocation_tokens
        if not wanted:
            return 0
        starts = range(len(prompt) - len(wanted), -1, -1)
        return next((at for at in starts if prompt[at : at + len(wanted)] == wanted), NEVER)


class AdapterWork(NamedTuple):
    """Which adapters' versions have requests; none is in both."""

    running: frozenset[int] = frozenset()
    """In the batch."""
    waiting: frozenset[int] = frozenset()
    """Those whose requests all wait, for a place or for a slot."""


class AdapterStats(NamedTuple):
    """Where the adapters are. The counts of events are since the engine's start."""

    known: int = 0
    """Loaded adapters, wherever they are."""
    host: int = 0
    """Those whose weights are in host memory."""
    device: int = 0
    """Those in device slots."""
    host_bytes: int = 0
    """Taken by adapters, those that are being read included."""
    host_limit: int = 0
    device_bytes: int = 0
    """Taken by copies on the device; 0 on a CPU, whose slots hold the host's own."""
    device_limit: int | None = None
    host_evictions: int = 0
    """Adapters that left host memory for others; their files remain."""
    device_evictions: int = 0
    """Adapters that left their slot for others."""
    reads: int = 0
    """Adapters that were read from disk again."""
    read_seconds: float = 0.0
    late_reads: int = 0
    """Reads that had not ended when a request would have had its turn."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's gauges after a step."""

    waiting: int = 0
    running: int = 0
    batch_size: int = 0
    """Sequences in this step; 0 if there was none."""
    batch_tokens: int = 0
    """Tokens computed by this step."""
    kv_tokens: int = 0
    """Tokens of running sequences in the KV cache."""
    kv_cached_tokens: int = 0
    """Tokens of ended sequences that the KV cache keeps for prompts that begin alike."""
    kv_capacity: int = 0
    prefix_cache_queries: int = 0
    """Tokens of all admitted prompts, since the start."""
    prefix_cache_hits: int = 0
    """Those of them that were found in the KV cache."""
    preemptions: int = 0
    """Sequences that gave up their row to others, since the start."""
    adapters: AdapterStats = field(default_factory=AdapterStats)
    step_seconds: float = 0.0
