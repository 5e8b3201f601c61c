"""Policies as they are compared: the policy, and what its rule allows in a recovery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..propagation import ReplicationPolicy, make_replication_policy
from ..propagation.foresight import ChainRule
from .takers import Chain, Vacancy, fastest, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    name: str
    scenario: str
    policy: ReplicationPolicy
    replay: bool
    takers: Callable[[Vacancy], Chain | None] | None = fastest
    decide_every_s: int = 15
    moves_every_s: int = 0
    server: bool = False
    leavers_serve: bool = False


def make_setup(name: str, scenario: str, **options):
    takers = {"fastest": fastest, "nearest": nearest, "own": None}[options.pop("takers", "own" if name=="mobility" else "fastest")]
    replay = options.pop("replay", name in ("mobility", "next_stage"))
    server = name == "central"
    more = {}
    for key in ("decide_every_s", "moves_every_s", "leavers_serve"):
        if key in options:
            more[key] = options.pop(key)
    if name == "mobility":
        more.setdefault("moves_every_s", 2)
        rule = {k[2:]: options.pop(k) for k in list(options) if k.startswith("c_")}
        options["chain"] = ChainRule(**rule)
    if name == "central":
        options["device"] = "server"
    return Setup(name=name, scenario=scenario, policy=make_replication_policy(name, **options),
                 replay=replay, takers=takers, server=server, **more)
