"""`crowdmesh policies`: a comparison as a table and as JSON; refusals."""

import json

import pytest

from crowdmesh_jax.cli import main
from crowdmesh_jax.simulation import simulate

SHORT = ("--scenario", "calm", "--policies", "next_stage,neighbour", "--seeds", "1")


def test_a_comparison_is_told_as_json(capsys):
    assert main(["policies", *SHORT, "--first-seed", "7", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["scenario"] == "calm"
    assert answer["seeds"] == [7]
    ours, theirs = answer["rows"]
    assert (ours["policy"], theirs["policy"]) == ("next_stage", "neighbour")
    assert "below" not in theirs
    times = [row["elapsed_s"]["value"] for row in answer["rows"]]
    assert times[0] == simulate("calm", "next_stage", 7).elapsed_s
    assert ours["below"]["value"] == pytest.approx(1 - times[0] / times[1])
    assert sum(ours["split_s"].values()) == pytest.approx(times[0])


def test_a_comparison_is_told_as_a_table(capsys):
    assert main(["policies", *SHORT]) == 0
    text = capsys.readouterr().out
    assert "calm, seeds 1000 to 1000" in text
    assert "below neighbour" in text
    (row,) = [line.split() for line in text.splitlines() if "next_stage" in line]
    assert float(row[1]) > 2500


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "--seeds must lie in 1..1000"),
        (["--policies", "mobilty"], "did you mean 'mobility'"),
        (["--policies", ","], "needs seeds, and policies"),
        (["--scenario", "windy"], "no scenario 'windy'"),
        (["--first-seed", "-1"], "seed"),
    ],
)
def test_a_wrong_wish_is_refused(capsys, argv, message):
    assert main(["policies", *argv]) == 2
    assert message in capsys.readouterr().err
