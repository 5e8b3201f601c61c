"""Values that all rooms share, and the maths on them: crowds, profiles, plans, schedules, costs.

Pure Python. It loads no jax and no solver, so every process may import it.
"""

from .builders import (
    ScheduleBuilder,
    make_schedule,
    schedule_for,
    schedules,
    search_schedule,
    warmup_depths,
    weight_delays,
)
from .coalition import CoalitionStructure
from .cost import (
    Prediction,
    StagePrediction,
    closed_form,
    cut_times,
    first_microbatch_s,
    period_s,
    predict,
    row_shares,
    stage_times,
    step_time_s,
    strict_period_s,
)
from .crowd import (
    Access,
    Backhaul,
    Crowd,
    DefaultLink,
    Device,
    DeviceId,
    Link,
    Medium,
)
from .links import (
    occupied_s,
    pair_times,
)
from .memory import (
    COMPILE_PEAK_BYTES,
    MemoryBreakdown,
    stage_memory,
)
from .plan import (
    PipelinePlan,
    Share,
    Stage,
    WireDtype,
)
from .profile import (
    LayerProfile,
    LayerSeconds,
    ModelProfile,
)
from .replicas import (
    Keep,
    Replica,
    ReplicaPlan,
    ReplicaRange,
)
from .schedule import (
    Op,
    OpKind,
    Schedule,
    check_runnable,
    check_schedule,
)
from .timeline import Timeline, evaluate, evaluate_step_s
from .times import CutTimes, Direction, StageTimes, TimedOp, TimedTransfer
from .values import (
    from_json,
    from_plain,
    from_toml,
    load,
    to_json,
    to_plain,
    to_toml,
)

__all__ = [
    "COMPILE_PEAK_BYTES",
    "Access",
    "Backhaul",
    "CoalitionStructure",
    "Crowd",
    "CutTimes",
    "DefaultLink",
    "Device",
    "DeviceId",
    "Direction",
    "Keep",
    "LayerProfile",
    "LayerSeconds",
    "Link",
    "Medium",
    "MemoryBreakdown",
    "ModelProfile",
    "Op",
    "OpKind",
    "PipelinePlan",
    "Prediction",
    "Replica",
    "ReplicaPlan",
    "ReplicaRange",
    "Schedule",
    "ScheduleBuilder",
    "Share",
    "Stage",
    "StagePrediction",
    "StageTimes",
    "TimedOp",
    "TimedTransfer",
    "Timeline",
    "WireDtype",
    "check_runnable",
    "check_schedule",
    "closed_form",
    "cut_times",
    "evaluate",
    "evaluate_step_s",
    "first_microbatch_s",
    "from_json",
    "from_plain",
    "from_toml",
    "load",
    "make_schedule",
    "occupied_s",
    "pair_times",
    "period_s",
    "predict",
    "row_shares",
    "schedule_for",
    "schedules",
    "search_schedule",
    "stage_memory",
    "stage_times",
    "step_time_s",
    "strict_period_s",
    "to_json",
    "to_plain",
    "to_toml",
    "warmup_depths",
    "weight_delays",
]
