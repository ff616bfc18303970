from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_STARTING: _ClassVar[Phase]
    PHASE_LOADING: _ClassVar[Phase]
    PHASE_WARMING: _ClassVar[Phase]
    PHASE_JOINING: _ClassVar[Phase]
    PHASE_SERVING: _ClassVar[Phase]
    PHASE_DRAINING: _ClassVar[Phase]
    PHASE_FAILED: _ClassVar[Phase]
    PHASE_DOWNLOADING: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
PHASE_STARTING: Phase
PHASE_LOADING: Phase
PHASE_WARMING: Phase
PHASE_JOINING: Phase
PHASE_SERVING: Phase
PHASE_DRAINING: Phase
PHASE_FAILED: Phase
PHASE_DOWNLOADING: Phase

class JoinRequest(_message.Message):
    __slots__ = ("hello", "ready", "status", "broken", "formed", "leave")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    FORMED_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ready: Ready
    status: RankStatus
    broken: Broken
    formed: Formed
    leave: Leave
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., status: _Optional[_Union[RankStatus, _Mapping]] = ..., broken: _Optional[_Union[Broken, _Mapping]] = ..., formed: _Optional[_Union[Formed, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("rank", "epoch", "launch_digest", "pid")
    RANK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    epoch: int
    launch_digest: str
    pid: int
    def __init__(self, rank: _Optional[int] = ..., epoch: _Optional[int] = ..., launch_digest: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("weights_digest",)
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    weights_digest: str
    def __init__(self, weights_digest: _Optional[str] = ...) -> None: ...

class Broken(_message.Message):
    __slots__ = ("epoch", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Formed(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("form", "abort", "release", "drain")
    FORM_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    form: Form
    abort: AbortEpoch
    release: Release
    drain: SetDraining
    def __init__(self, form: _Optional[_Union[Form, _Mapping]] = ..., abort: _Optional[_Union[AbortEpoch, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., drain: _Optional[_Union[SetDraining, _Mapping]] = ...) -> None: ...

class Form(_message.Message):
    __slots__ = ("epoch", "store")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    store: str
    def __init__(self, epoch: _Optional[int] = ..., store: _Optional[str] = ...) -> None: ...

class AbortEpoch(_message.Message):
    __slots__ = ("epoch", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetDraining(_message.Message):
    __slots__ = ("draining",)
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    def __init__(self, draining: _Optional[bool] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("epoch", "pod")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    pod: int
    def __init__(self, epoch: _Optional[int] = ..., pod: _Optional[int] = ...) -> None: ...

class RunResponse(_message.Message):
    __slots__ = ("epoch", "step", "plan")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    plan: bytes
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., plan: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("once",)
    ONCE_FIELD_NUMBER: _ClassVar[int]
    once: bool
    def __init__(self, once: _Optional[bool] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("phase", "epoch", "ranks", "running", "waiting", "kv_blocks", "kv_blocks_used", "recoveries", "reason", "run", "tokens_per_second")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    epoch: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    recoveries: int
    reason: str
    run: str
    tokens_per_second: float
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., epoch: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., recoveries: _Optional[int] = ..., reason: _Optional[str] = ..., run: _Optional[str] = ..., tokens_per_second: _Optional[float] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "pod", "phase", "epoch", "step", "bytes_loaded", "bytes_total", "memory_bytes", "reason", "phase_seconds", "bytes_per_second")
    RANK_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PHASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pod: int
    phase: Phase
    epoch: int
    step: int
    bytes_loaded: int
    bytes_total: int
    memory_bytes: int
    reason: str
    phase_seconds: float
    bytes_per_second: int
    def __init__(self, rank: _Optional[int] = ..., pod: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., bytes_loaded: _Optional[int] = ..., bytes_total: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., reason: _Optional[str] = ..., phase_seconds: _Optional[float] = ..., bytes_per_second: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_seconds",)
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    timeout_seconds: float
    def __init__(self, timeout_seconds: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: int
    def __init__(self, remaining: _Optional[int] = ...) -> None: ...
