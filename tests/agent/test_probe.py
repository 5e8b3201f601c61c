"""A hop is timed between two sides that do nothing else, and a silent one is named."""

import asyncio

import pytest

from crowdmesh_jax.agent import probe as module
from crowdmesh_jax.agent.envelope import seal, unseal
from crowdmesh_jax.agent.probe import MOST, WARMUP, Probe, is_probe
from crowdmesh_jax.errors import PeerLostError
from crowdmesh_jax.programs.manifest import LeafSpec

DOWN = (LeafSpec("y", "", "0", "bfloat16", (4, 3)), LeafSpec("y", "", "1", "int32", (4,)))
BACK = (LeafSpec("dx", "", "0", "float32", (4, 3)),)


class Pair:
    """Sides "a" (above) and "b"; frames take the form that they have on a wire."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.sent: list[tuple[str, dict, list[tuple[tuple[int, ...], str]]]] = []
        self.computed: list[str] = []
        self.sides = {name: Probe(self.sender(name), self.computer(name)) for name in "ab"}

    def sender(self, me):
        async def send(to, envelope):
            got = unseal(seal(envelope))
            arrays = [(a.shape, str(a.dtype)) for a in got.groups[0].values()]
            self.sent.append((me, dict(got.extra), arrays))
            await asyncio.sleep(self.delay_s)
            assert is_probe(got.extra)
            await self.sides[to].arrived(me, got.extra, BACK)

        return send

    def computer(self, me):
        async def compute():
            self.computed.append(me)

        return compute


def test_a_round_trip_carries_the_cuts_leaves_both_ways_and_passes_both_compute_threads():
    pair = Pair(delay_s=0.002)
    seconds = asyncio.run(pair.sides["a"].round_trip_s("b", DOWN))
    assert 0.004 <= seconds < 1.0
    assert len(pair.sent) == 2 * (WARMUP + MOST)
    assert pair.sent[0][2] == [((4, 3), "bfloat16"), ((4,), "int32")]
    assert pair.sent[1][2] == [((4, 3), "float32")]
    assert pair.computed == ["b", "a"] * (WARMUP + MOST)


def test_a_slow_link_is_not_asked_more_often_than_needed(monkeypatch):
    monkeypatch.setattr(module, "ENOUGH_S", 0.0)
    pair = Pair()
    asyncio.run(pair.sides["a"].round_trip_s("b", DOWN))
    assert len(pair.sent) == 2 * (WARMUP + module.LEAST)


def test_an_answer_to_an_older_probe_counts_for_nothing(monkeypatch):
    monkeypatch.setattr(module, "DEADLINE_S", 0.05)
    probe = None

    async def answered_late(to, envelope):
        older = {"probe": envelope.extra["probe"] - 1, "way": "back"}
        await probe.arrived(to, older, BACK)

    async def compute():
        pass

    probe = Probe(answered_late, compute)

    async def run():
        await probe.arrived("b", {"probe": 7, "way": "back"}, BACK)  # nobody waits
        await probe.round_trip_s("b", DOWN)

    with pytest.raises(PeerLostError, match="to return a probe"):
        asyncio.run(run())


def test_a_neighbour_that_does_not_answer_is_named_with_how_long_and_why_that_long(monkeypatch):
    monkeypatch.setattr(module, "DEADLINE_S", 0.05)

    async def nowhere(to, envelope):
        pass

    async def compute():
        pass

    silent = Probe(nowhere, compute)
    with pytest.raises(PeerLostError, match=r"waited 0\.05 s for 'b' to return a probe"):
        asyncio.run(silent.round_trip_s("b", DOWN))
