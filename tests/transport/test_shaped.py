"""The shared link is exact, whoever asks and however often; the transport keeps its times."""

import asyncio
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.transport import Frame, Lane, MemoryNetwork, ShapedTransport, SharedLink

FLOOR = 0.05

pushes = st.lists(
    st.tuples(st.floats(0, 10, allow_subnormal=False), st.integers(0, 10_000), st.booleans()),
    min_size=1,
    max_size=12,
).map(lambda items: sorted(items, key=lambda item: item[0]))


def play(items, rate, *, looks=()):
    """{index: time done}; `looks` are extra times at which somebody asks."""
    link = SharedLink(rate, floor_share=FLOOR, now_s=0.0)
    done = []
    events = [(at, index) for index, (at, _, _) in enumerate(items)] + [(at, -1) for at in looks]
    for at, index in sorted(events, key=lambda event: event[0]):
        if index < 0:
            done += link.advance(at)
        else:
            done += link.push(index, items[index][1], at, bulk=items[index][2])
    while not link.is_idle:
        done += link.advance(link.next_s())
    assert [at for at, _ in done] == sorted(at for at, _ in done)
    return {index: at for at, index in done}


@settings(deadline=None)
@given(pushes, st.floats(1, 1e6))
def test_the_link_is_never_idle_while_something_waits(items, rate):
    free_s = 0.0
    for at, size, _ in items:
        free_s = max(free_s, at) + size / rate
    assert max(play(items, rate).values()) == pytest.approx(free_s, rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(pushes, st.floats(1, 1e6))
def test_each_class_keeps_its_order_and_urgent_items_hardly_notice_bulk_ones(items, rate):
    done = play(items, rate)
    assert done.keys() == set(range(len(items)))
    for bulk in (False, True):
        times = [done[i] for i, item in enumerate(items) if item[2] is bulk]
        assert times == sorted(times)
    free_s = 0.0
    for index, (at, size, bulk) in enumerate(items):
        if not bulk:
            free_s = max(free_s, at) + size / (rate * (1 - FLOOR))
            assert done[index] <= free_s + 1e-6


@settings(deadline=None)
@given(pushes, st.floats(1, 1e6))
def test_bulk_items_get_their_floor_share_at_least(items, rate):
    done = play(items, rate)
    free_s = 0.0
    for index, (at, size, bulk) in enumerate(items):
        if bulk:
            free_s = max(free_s, at) + size / (rate * FLOOR)
            assert done[index] <= free_s * (1 + 1e-9) + 1e-6


@settings(deadline=None)
@given(pushes, st.floats(1, 1e6), st.lists(st.floats(0, 20), max_size=10))
def test_asking_more_often_changes_nothing(items, rate, looks):
    plain, watched = play(items, rate), play(items, rate, looks=looks)
    for index, at in plain.items():
        assert watched[index] == pytest.approx(at, rel=1e-6, abs=1e-6)


def test_a_link_of_rate_zero_holds_everything_until_it_has_a_rate():
    link = SharedLink(0.0, now_s=0.0)
    link.push("frame", 100, 0.0, bulk=False)
    assert link.advance(1e6) == []
    assert link.next_s() == math.inf
    link.set_rate(10.0, 1e6)
    assert link.advance(1e6 + 10.0) == [(1e6 + 10.0, "frame")]


def test_an_infinite_rate_passes_everything_at_once():
    link = SharedLink(math.inf, now_s=5.0)
    done = link.push("a", 100, 5.0, bulk=True) + link.push("b", 100, 5.0, bulk=False)
    assert done + link.advance(5.0) == [(5.0, "a"), (5.0, "b")]


@pytest.mark.parametrize("rate", [-1.0, math.nan])
def test_a_rate_below_zero_is_refused(rate):
    with pytest.raises(InvalidValueError, match="rate"):
        SharedLink(rate, now_s=0.0)


def shaped_pair(links):
    network = MemoryNetwork()
    return [ShapedTransport(network.transport(device), links) for device in ("a", "b")]


async def joined(links):
    a, b = shaped_pair(links)
    await a.start()
    await a.connect("b", await b.start(), deadline_s=5)
    return a, b


def test_frames_take_bytes_over_rate_and_errors_do_not_add_up():
    frames, size, rate, latency_s = 100, 10_000, 4e6, 0.03

    async def run():
        a, b = await joined(lambda peer: (rate, latency_s))
        started_s = time.monotonic()
        for index in range(frames):
            await a.send("b", Frame({"i": index}, (np.zeros(size, np.uint8),)), Lane.PIPELINE)
        sizes = 0
        first_s = None
        for _ in range(frames):
            received = await b.receive()
            first_s = first_s or received.received_s - started_s
            sizes += received.size_bytes
        took_s = time.monotonic() - started_s
        await a.close()
        await b.close()
        return first_s, took_s, sizes / rate + latency_s

    first_s, took_s, expected_s = asyncio.run(run())
    assert expected_s - 0.002 <= took_s < expected_s + 0.05  # 100 late wake-ups would be 0.1 s
    assert latency_s < first_s < latency_s + 0.05


def test_both_directions_have_a_link_of_their_own():
    async def run():
        a, b = await joined(lambda peer: (1e6, 0.0))
        frame = Frame({}, (np.zeros(200_000, np.uint8),))
        started_s = time.monotonic()
        await a.send("b", frame)
        await b.send("a", frame)
        await asyncio.gather(a.receive(), b.receive())
        took_s = time.monotonic() - started_s
        await a.close()
        await b.close()
        return took_s

    assert 0.19 < asyncio.run(run()) < 0.3  # shared it would be 0.4


def test_a_cut_link_is_silent_and_delivers_when_it_is_back():
    rate = {"b": 0.0}

    async def run():
        a, b = await joined(lambda peer: (rate.get(peer, 1e9), 0.0))
        await a.send("b", Frame({"held": True}))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await b.receive()
        rate["b"] = 1e9
        a.refresh()
        async with asyncio.timeout(2):
            assert (await b.receive()).frame.message == {"held": True}
        await a.close()
        await b.close()

    asyncio.run(run())


def test_a_pair_without_a_link_is_not_shaped():
    async def run():
        a, b = await joined(lambda peer: None)
        started_s = time.monotonic()
        await a.send("b", Frame({}, (np.zeros(50_000_000, np.uint8),)))
        await b.receive()
        await a.close()
        await b.close()
        return time.monotonic() - started_s

    assert asyncio.run(run()) < 0.5


def test_a_link_does_not_carry_what_is_still_being_computed():
    class Late:
        dtype, shape = np.dtype(np.uint8), (100_000,)
        done = threading.Event()

        def is_ready(self):
            return False

        def __array__(self, dtype=None, copy=None):
            assert self.done.wait(3)
            return np.zeros(self.shape, self.dtype)

    async def run():
        a, b = await joined(lambda peer: (1e6, 0.0))  # 0.1 s for the frame
        started_s = time.monotonic()
        late = Late()
        await a.send("b", Frame({}, (late,)))
        await asyncio.sleep(0.15)
        late.done.set()
        await b.receive()
        took_s = time.monotonic() - started_s
        await a.close()
        await b.close()
        return took_s

    assert 0.24 < asyncio.run(run()) < 0.5
