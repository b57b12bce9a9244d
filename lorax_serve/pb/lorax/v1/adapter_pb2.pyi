# mypy: ignore-errors
import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROBE_OUTCOME_UNSPECIFIED: _ClassVar[ProbeOutcome]
    PROBE_OUTCOME_UNCHECKED: _ClassVar[ProbeOutcome]
    PROBE_OUTCOME_PASSED: _ClassVar[ProbeOutcome]
    PROBE_OUTCOME_FAILED: _ClassVar[ProbeOutcome]

class AdapterEvent(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_EVENT_UNSPECIFIED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_PRESENT: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_SYNCED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_LOADED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_CHANGED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_UNLOADED: _ClassVar[AdapterEvent]
    ADAPTER_EVENT_REFUSED: _ClassVar[AdapterEvent]

class AdapterTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_TIER_UNSPECIFIED: _ClassVar[AdapterTier]
    ADAPTER_TIER_DEVICE: _ClassVar[AdapterTier]
    ADAPTER_TIER_HOST: _ClassVar[AdapterTier]
    ADAPTER_TIER_DISK: _ClassVar[AdapterTier]

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_READY: _ClassVar[AdapterState]
    ADAPTER_STATE_DRAINING: _ClassVar[AdapterState]
    ADAPTER_STATE_SUPERSEDED: _ClassVar[AdapterState]
PROBE_OUTCOME_UNSPECIFIED: ProbeOutcome
PROBE_OUTCOME_UNCHECKED: ProbeOutcome
PROBE_OUTCOME_PASSED: ProbeOutcome
PROBE_OUTCOME_FAILED: ProbeOutcome
ADAPTER_EVENT_UNSPECIFIED: AdapterEvent
ADAPTER_EVENT_PRESENT: AdapterEvent
ADAPTER_EVENT_SYNCED: AdapterEvent
ADAPTER_EVENT_LOADED: AdapterEvent
ADAPTER_EVENT_CHANGED: AdapterEvent
ADAPTER_EVENT_UNLOADED: AdapterEvent
ADAPTER_EVENT_REFUSED: AdapterEvent
ADAPTER_TIER_UNSPECIFIED: AdapterTier
ADAPTER_TIER_DEVICE: AdapterTier
ADAPTER_TIER_HOST: AdapterTier
ADAPTER_TIER_DISK: AdapterTier
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_READY: AdapterState
ADAPTER_STATE_DRAINING: AdapterState
ADAPTER_STATE_SUPERSEDED: AdapterState

class LoadAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "path", "weight", "pinned")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    path: str
    weight: int
    pinned: bool
    def __init__(self, adapter_id: _Optional[str] = ..., path: _Optional[str] = ..., weight: _Optional[int] = ..., pinned: _Optional[bool] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("adapter_id", "digest", "config_bytes", "weights_bytes", "weight", "pinned")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONFIG_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    digest: str
    config_bytes: int
    weights_bytes: int
    weight: int
    pinned: bool
    def __init__(self, adapter_id: _Optional[str] = ..., digest: _Optional[str] = ..., config_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., weight: _Optional[int] = ..., pinned: _Optional[bool] = ...) -> None: ...

class UploadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "report")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    report: LoadReport
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., report: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class UpdateAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "weight", "pinned")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    weight: int
    pinned: bool
    def __init__(self, adapter_id: _Optional[str] = ..., weight: _Optional[int] = ..., pinned: _Optional[bool] = ...) -> None: ...

class UpdateAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "report")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    report: LoadReport
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., report: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class InspectAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "path")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    path: str
    def __init__(self, adapter_id: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class InspectAdapterResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: LoadReport
    def __init__(self, report: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("digest", "base_model", "variants", "modules", "matched", "unmatched", "missing", "module_count", "matched_count", "unmatched_count", "missing_count", "file_bytes", "host_bytes", "warnings", "probe", "reject_reason", "problems")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    UNMATCHED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    MODULE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MATCHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    UNMATCHED_COUNT_FIELD_NUMBER: _ClassVar[int]
    MISSING_COUNT_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    REJECT_REASON_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    base_model: str
    variants: _containers.RepeatedScalarFieldContainer[str]
    modules: _containers.RepeatedCompositeFieldContainer[ModuleReport]
    matched: _containers.RepeatedScalarFieldContainer[str]
    unmatched: _containers.RepeatedScalarFieldContainer[str]
    missing: _containers.RepeatedScalarFieldContainer[str]
    module_count: int
    matched_count: int
    unmatched_count: int
    missing_count: int
    file_bytes: int
    host_bytes: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    probe: ProbeReport
    reject_reason: str
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digest: _Optional[str] = ..., base_model: _Optional[str] = ..., variants: _Optional[_Iterable[str]] = ..., modules: _Optional[_Iterable[_Union[ModuleReport, _Mapping]]] = ..., matched: _Optional[_Iterable[str]] = ..., unmatched: _Optional[_Iterable[str]] = ..., missing: _Optional[_Iterable[str]] = ..., module_count: _Optional[int] = ..., matched_count: _Optional[int] = ..., unmatched_count: _Optional[int] = ..., missing_count: _Optional[int] = ..., file_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., probe: _Optional[_Union[ProbeReport, _Mapping]] = ..., reject_reason: _Optional[str] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class ModuleReport(_message.Message):
    __slots__ = ("path", "kind", "rank", "alpha", "scale")
    PATH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    path: str
    kind: str
    rank: int
    alpha: float
    scale: float
    def __init__(self, path: _Optional[str] = ..., kind: _Optional[str] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., scale: _Optional[float] = ...) -> None: ...

class ProbeReport(_message.Message):
    __slots__ = ("outcome", "difference", "tolerance", "effect", "message")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    outcome: ProbeOutcome
    difference: float
    tolerance: float
    effect: float
    message: str
    def __init__(self, outcome: _Optional[_Union[ProbeOutcome, str]] = ..., difference: _Optional[float] = ..., tolerance: _Optional[float] = ..., effect: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("freed_bytes", "host_bytes", "device_bytes", "disk_bytes")
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ...) -> None: ...

class RollbackAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "digest")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    digest: str
    def __init__(self, adapter_id: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class RollbackAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "failed")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    failed: _containers.RepeatedCompositeFieldContainer[FailedAdapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., failed: _Optional[_Iterable[_Union[FailedAdapter, _Mapping]]] = ...) -> None: ...

class FailedAdapter(_message.Message):
    __slots__ = ("adapter_id", "message", "reason")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    message: str
    reason: str
    def __init__(self, adapter_id: _Optional[str] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class WatchAdaptersResponse(_message.Message):
    __slots__ = ("event", "adapter_id", "adapter", "message", "reason")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    event: AdapterEvent
    adapter_id: str
    adapter: Adapter
    message: str
    reason: str
    def __init__(self, event: _Optional[_Union[AdapterEvent, str]] = ..., adapter_id: _Optional[str] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("adapter_id", "version", "digest", "state", "rank", "module_count", "host_bytes", "active_requests", "total_requests", "last_used", "weight", "pinned", "tier")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    MODULE_COUNT_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version: int
    digest: str
    state: AdapterState
    rank: int
    module_count: int
    host_bytes: int
    active_requests: int
    total_requests: int
    last_used: _timestamp_pb2.Timestamp
    weight: int
    pinned: bool
    tier: AdapterTier
    def __init__(self, adapter_id: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., rank: _Optional[int] = ..., module_count: _Optional[int] = ..., host_bytes: _Optional[int] = ..., active_requests: _Optional[int] = ..., total_requests: _Optional[int] = ..., last_used: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., weight: _Optional[int] = ..., pinned: _Optional[bool] = ..., tier: _Optional[_Union[AdapterTier, str]] = ...) -> None: ...
