"""What a device has left for copies."""

from dataclasses import replace

from replica_worlds import copies, crowd, plan, profile

from crowdmesh_jax.propagation import Budget, copy_bytes, hosted_bytes, rooms, stage_need


def test_room_is_what_the_own_stage_leaves():
    made, there = plan(), crowd(memory_bytes=1_000_000)
    need = stage_need(profile(), made, 0, snapshots=1).training_bytes
    left = rooms(made, profile(), there, Budget())
    assert left["a"].memory_bytes == 1_000_000 - need
    assert left["e"].memory_bytes == 1_000_000


def test_a_copy_has_the_optimizers_globals():
    assert copy_bytes(replace(profile(), globals_bytes=7), 0, 1) == 6007


def test_hosted_copies_count_against_memory_where_they_are_kept_there():
    made, holders = plan(), {"a": "d", "b": "d", "c": "d"}
    hosted = hosted_bytes(copies(made, holders), profile(), "d")
    assert hosted == 2 * 3 * 6 * 1000
    assert hosted_bytes(copies(made, holders), profile(), "d", versions=1) == hosted / 2
    assert hosted_bytes(copies(made, holders, "disk"), profile(), "d") == 0
    assert hosted_bytes(copies(made, holders, "disk"), profile(), "d", keep="disk") == hosted
    bare, full = (
        stage_need(profile(), made, 1, hosted_bytes=size, compile_peak_bytes=0).total_bytes
        for size in (0, hosted)
    )
    assert full == bare + hosted
