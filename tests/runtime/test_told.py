"""What devices tell beside the protocol is checked."""

import pytest

from crowdmesh_jax.control import LinkMeasured
from crowdmesh_jax.runtime.told import read_carried


def test_what_a_link_carried_is_a_rate():
    told = {"sender": "a", "seconds": 0.5, "bytes": 1000}
    assert read_carried("b", told) == LinkMeasured(sender="a", receiver="b", bytes_per_s=2000.0)


@pytest.mark.parametrize(
    "figures",
    [
        None, 7, {}, {"sender": "a", "seconds": 1.0}, {"sender": "a", "seconds": 0, "bytes": 1},
        {"sender": "a", "seconds": -1.0, "bytes": 1}, {"sender": 5, "seconds": 1.0, "bytes": 1},
        {"sender": "a", "seconds": "soon", "bytes": 1},
        {"sender": "a", "seconds": 1.0, "bytes": float("inf")},
        {"sender": "a", "seconds": float("nan"), "bytes": 1},
    ],
)  # fmt: skip
def test_what_is_none_is_refused_with_a_line_in_the_log(figures, caplog):
    assert read_carried("b", figures) is None
    assert "what a link carried to b was refused" in caplog.text
