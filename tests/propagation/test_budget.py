"""What a device has left for copies."""

from dataclasses import replace

from replica_worlds import crowd, plan, profile

from crowdmesh_jax.propagation import Budget, copy_bytes, rooms, stage_need


def test_room_is_what_the_own_stage_leaves():
    made, there = plan(), crowd(memory_bytes=1_000_000)
    need = stage_need(profile(), made, 0, snapshots=1).training_bytes
    left = rooms(made, profile(), there, Budget())
    assert left["a"].memory_bytes == 1_000_000 - need
    assert left["e"].memory_bytes == 1_000_000


def test_a_copy_has_the_optimizers_globals():
    assert copy_bytes(replace(profile(), globals_bytes=7), 0, 1) == 6007
