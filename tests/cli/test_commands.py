"""The command line: answers, JSON with the same values, errors in one line with status 2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from crowdmesh_jax.cli import COMMANDS, main
from crowdmesh_jax.core import Crowd, PipelinePlan, from_json, from_plain, to_toml
from crowdmesh_jax.crowds import preset
from crowdmesh_jax.solvers import solvers

SHELF = Path(__file__).parents[2] / "examples" / "crowds" / "shelf.toml"
NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]


def _lines(capsys, *argv):
    assert main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_help_teaches_by_example_and_loads_no_jax():
    code = (
        "import sys\nfrom crowdmesh_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy', {'jax', 'flax', 'optax', 'grpc', 'pulp', 'rich'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy set()" in out.stdout
    for name in NAMES:
        assert f"\n    {name} " in out.stdout or f"\n    {name}\n" in out.stdout


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_examples_and_json(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"crowdmesh {name}" in text
    assert "--json" in text


def test_models_lists_the_zoo_with_true_figures(capsys):
    rows = {row["name"]: row for row in _lines(capsys, "models", "--json")}
    assert {"mlp", "resnet18", "mobilenet_v2_cifar", "har_lstm", "gpt2"} < set(rows)
    assert rows["gpt2"]["parameters"] == 124_439_808
    assert rows["gpt2"]["parameter_bytes"] == 4 * 124_439_808
    assert rows["resnet50"]["macs"] == pytest.approx(4.089e9, rel=0.02)
    assert rows["resnet50"]["largest_cut_bytes"] == 4 * 56 * 56 * 256
    assert rows["lenet"]["layers"][0] == "conv0"
    assert _table_of_the_page() == {
        name: pytest.approx(
            [len(row["layers"]), row["parameters"], row["macs"], row["largest_cut_bytes"]], rel=0.01
        )
        for name, row in rows.items()
    }


def _table_of_the_page():
    """Name -> layers, parameters, MACs and bytes at a cut, as docs/models.md says."""
    units = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1, "kB": 1e3, "MB": 1e6}
    told = {}
    for line in (SHELF.parents[2] / "docs" / "models.md").read_text().splitlines():
        if line.startswith("| `"):
            name, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
            parts = [(*cell.replace(",", "").split(), "")[:2] for cell in cells[:4]]
            told[name] = [float(number) * units[unit] for number, unit in parts]
    return told


def test_models_shows_those_that_are_named(capsys):
    assert main(["models", "mlp", "ds_cnn"]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("mlp", "ds_cnn", "23.2 k", "2.7 M", "92.7 kB", "32.0 kB"))
    assert "lenet" not in text


def test_solvers_lists_solvers_and_backends(capsys):
    (told,) = _lines(capsys, "solvers", "--json")
    assert {"ilp", "even", "exhaustive"} <= set(told["solvers"])
    assert {"hedonic", "greedy", "exhaustive"} <= set(told["coalition_solvers"])
    assert "highs" in told["backends"]
    assert main(["solvers"]) == 0
    assert "backends of ilp: highs" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_crowd_writes_a_file_that_plan_reads(capsys, tmp_path, ending):
    path = tmp_path / f"crowd.{ending}"
    argv = ("crowd", "two_cells", "--devices", "4", "--seed", "3", "-o", str(path))
    (told,) = _lines(capsys, *argv, "--json")
    assert Crowd.load(path) == preset("two_cells", 4, seed=3) == from_plain(Crowd, told["crowd"])
    assert (told["preset"], told["seed"], told["output"]) == ("two_cells", 3, str(path))
    speeds = [device.flops_per_s for device in Crowd.load(path).devices]
    summary = {row["figure"]: row for row in told["summary"]}
    assert (summary["flops_per_s"]["least"], summary["flops_per_s"]["most"]) == (
        min(speeds), max(speeds),
    )  # fmt: skip
    options = ("--model", "mlp", "--solver", "even", "--use-all", "--microbatches", "4")
    assert main(["plan", "--crowd", str(path), *options]) == 0
    assert "phone-1" in capsys.readouterr().out


def test_crowd_shows_what_it_is_like_and_says_that_it_is_not_kept(capsys):
    assert main(["crowd", "two_cells", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    figures = ("speed", "free memory", "uplink", "downlink", "latency", "rows", "label skew")
    assert all(f"\n {figure} " in text for figure in (*figures, "mean stay"))
    assert "GFLOP/s" in text
    assert "two_cells, seed 3: 16 devices in 2 cells, 2.5 MB/s and 25 ms between them" in text
    assert "not kept" in text


def test_plan_explains_and_its_json_is_the_same_plan(capsys, tmp_path):
    crowd = tmp_path / "crowd.toml"
    crowd.write_text(to_toml(Crowd.local((1.0, 0.25))))
    output = tmp_path / "plan.json"
    options = ["--model", "mlp", "--microbatches", "4", "--solver", "exhaustive"]
    (told,) = _lines(capsys, "plan", str(crowd), *options, "--output", str(output), "--json")
    plan = from_plain(PipelinePlan, told["plan"])
    assert plan == from_json(PipelinePlan, output.read_text())
    assert plan.microbatches == 4
    assert told["predicted"]["step_s"] > 0
    assert main(["plan", "--crowd", str(crowd), *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step ")
    assert all(device in text for device in plan.devices)


def test_a_full_size_model_is_planned_over_the_shelf_without_its_weights(capsys, monkeypatch):
    from crowdmesh_jax.model import StagedModel

    def refuse(*_):
        raise AssertionError("weights were made")

    monkeypatch.setattr(StagedModel, "init", refuse)
    before = sum(array.nbytes for array in jax.live_arrays())
    (told,) = _lines(capsys, "plan", "--model", "resnet50", "--crowd", str(SHELF), "--json")
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20
    plan = from_plain(PipelinePlan, told["plan"])
    crowd = Crowd.load(SHELF)
    assert plan.num_layers == 20
    assert len(plan.stages) >= 3
    for stage, used in zip(plan.stages, told["predicted"]["stages"], strict=True):
        assert used["device"] == stage.device
        parts = {name: size for name, size in used["memory"].items() if name.endswith("_bytes")}
        assert 0 < parts["parameter_bytes"] < sum(parts.values())
        assert sum(parts.values()) <= crowd.device(stage.device).memory_bytes


def test_profile_shows_each_layer(capsys):
    (told,) = _lines(capsys, "profile", "mlp", "--speeds", "1,0.5", "--json")
    names = [layer["name"] for layer in told["layers"]]
    assert names == ["dense0", "dense1", "dense2", "head"]
    assert main(["profile", "mlp", "--speeds", "1,0.5"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in names)


def test_profile_compares_predicted_with_measured_layer_by_layer(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ("profile", "mlp", "--speeds", "1,0.5", "--measure", "--batch-size", "16")
    (told,) = _lines(capsys, *argv, "--json")
    assert told["source"] == "measured"
    assert told["memory_source"] == "compiled"
    assert [row["name"] for row in told["compared"]] == [row["name"] for row in told["layers"]]
    for row, seconds in zip(told["compared"], told["seconds"]["device-0"], strict=True):
        assert row["measured_s"] == pytest.approx(seconds["forward_s"] + seconds["backward_s"])
        assert row["ratio"] == pytest.approx(row["measured_s"] / row["predicted_s"])
        assert row["bound"] in ("arithmetic", "memory", "call")
        assert row["why"]
    assert main(argv) == 0, "the second time from the cache"
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "all layers: predicted" in text


def test_an_archive_with_other_arrays_is_told_what_it_has(tmp_path, capsys):
    path = tmp_path / "own.npz"
    np.savez(path, x=np.zeros(3), y=np.zeros(3))
    assert main(["train", "lenet", "--data", str(path)]) == 2
    assert "needs arrays 'inputs' and 'targets', it has x, y" in capsys.readouterr().err


def test_what_this_process_compiles_is_kept_where_the_user_wants_it(tmp_path):
    planner = tmp_path / "crowdmesh_jax" / "compiled" / "planner"
    command = [sys.executable, "-m", "crowdmesh_jax.cli", "profile", "mlp", "--speeds", "1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
        "XDG_CACHE_HOME": str(tmp_path / "other"),  # or the second call had nothing to measure
    }
    subprocess.run(command, env={**environment, **own}, check=True, capture_output=True)
    assert not planner.exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list(planner.iterdir())


@pytest.mark.parametrize(
    ("argv", "kind", "told"),
    [
        (["models", "mlp", "nope"], "ModelError [CM-120]", "known: ds_cnn"),
        (["train", "nope"], "ModelError [CM-120]", "known: ds_cnn"),
        (["crowd", "campsu"], "InvalidCrowdError [CM-110]", "did you mean 'campus'?"),
        (["crowd", "campus", "--devices", "-3"], "InvalidCrowdError [CM-110]", "got -3"),
        (["crowd", "campus", "--seed", "-1"], "InvalidCrowdError [CM-110]", "got -1"),
        (["crowd", "campus", "-o", "x.yaml"], "InvalidValueError [CM-101]", ".toml or .json"),
        (["plan", "--speeds", "1,fast"], "InvalidCrowdError [CM-110]", "got '1,fast'"),
        (["plan", "--speeds", "1,-1"], "InvalidCrowdError [CM-110]", "device-1"),
        (["plan", "none.toml"], "FormatError [CM-102]", "none.toml: cannot be read"),
        (["plan", "a.toml", "--crowd", "b.toml"], "InvalidCrowdError [CM-110]", "two crowds"),
        (["plan", "--crowd", "a.toml", "--speeds", "1"], "InvalidCrowdError", "give one"),
        (["plan", "--batch-size", "30"], "JobError [CM-130]", "8 equal microbatches"),
        (["plan", "--solver", "magic"], "UnknownSolverError [CM-202]", "exhaustive"),
        (["profile", "mlp", "--learning-rate", "nan"], "JobError [CM-130]", "got nan"),
        (["train", "lenet", "--data", "nowhere"], "DataError [CM-140]", "'digits'"),
        (["train", "lenet", "--data", "no.npz"], "DataError [CM-140]", "'inputs' and 'targets'"),
        (["train", "gpt2_test"], "DataError [CM-140]", "reads tokens"),
        (["train", "gpt2_test", "--data", "digits"], "DataError [CM-140]", "reads tokens"),
        (["train", "lenet", "--plan", "no.json"], "FormatError [CM-102]", "no.json"),
        (["train", "lenet", "--steps", "0"], "JobError [CM-130]", "steps"),
    ],
)
def test_errors_are_one_line_with_code_and_status_2(
    capsys, monkeypatch, tmp_path, argv, kind, told
):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    first = captured.err.splitlines()[0]
    assert first.startswith(kind)
    assert told in captured.err
    assert "Traceback" not in captured.err
    assert main([*argv, "--json"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["kind"] == kind.split()[0]
    assert error["docs"] == f"docs/errors.md#{error['code'].lower()}"


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    from crowdmesh_jax.errors import ModelError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        main(["train", "nope", "--debug"])


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["plan", "--schedule", "magic"]])
def test_wrong_usage_ends_with_status_2(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["models", "mlp"], ["models", "mlp", "--json"]])
def test_a_reader_that_goes_away_is_no_error(argv):
    code = f"import sys; from crowdmesh_jax.cli import main; sys.exit(main({argv}))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate(timeout=60)
    assert b"Traceback" not in errors
    assert child.returncode == 0


def test_text_becomes_rows_whose_targets_are_the_next_characters(tmp_path):
    from crowdmesh_jax.cli.inputs import find_model, read_data

    text = tmp_path / "book.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 10)
    source = read_data(str(text), find_model("gpt2_test"), 2, 0)
    inputs, targets = source.batch(0)
    assert inputs.shape == targets.shape == (2, 32)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.dtype == np.int32
    text.write_bytes(bytes(range(256)) * 4)
    from crowdmesh_jax.errors import DataError

    with pytest.raises(DataError, match="256 different bytes; gpt2_test knows 65 tokens"):
        read_data(str(text), find_model("gpt2_test"), 2, 0)


def test_a_plan_is_drawn_as_the_step_that_is_predicted(tmp_path, capsys):
    path = tmp_path / "plan.svg"
    argv = ["plan", "--speeds", "1,0.5", "--schedule", "eager", "--solver", "eager", "--json"]
    assert main([*argv, "--svg", str(path)]) == 0
    said = json.loads(capsys.readouterr().out)
    picture = ElementTree.parse(path).getroot()
    texts = [element.text for element in picture.iter() if element.text]
    for stage in said["plan"]["stages"]:
        assert stage["device"] in texts
    drawn = [text for text in texts if text.startswith(("forward of ", "backward of "))]
    ops = [op for op in said["predicted"]["timeline"]["ops"] if op["end_s"] > op["start_s"]]
    transfers = said["predicted"]["timeline"]["transfers"]
    assert len(drawn) == len(ops) + len(transfers)
    assert any("predicted (eager)" in text for text in texts)


def test_coalitions_are_formed_compared_and_certified(tmp_path, capsys):
    path = tmp_path / "crowd.toml"
    assert main(["crowd", "campus", "--devices", "7", "-o", str(path)]) == 0
    capsys.readouterr()
    argv = ["coalitions", "--crowd", str(path), "--max-size", "4", "--compare", "grand,greedy"]
    assert main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    members = [device for group in said["structure"]["coalitions"] for device in group]
    assert sorted(members) == sorted(device.id for device in Crowd.load(path).devices)
    assert said["is_nash_stable"]
    assert set(said["compared"]) == {"hedonic", "grand", "greedy"}
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "Nash-stable under 'marginal'" in told
    assert "slowest round" in told
    assert main(["coalitions", "--crowd", str(path), "--solver", "hedonik"]) == 2
    capsys.readouterr()
    drawn, argv = tmp_path / "map.svg", ["coalitions", "--crowd", str(path), "--json"]
    assert main([*argv, "--value", "closed_form", "--power", "1", "--svg", str(drawn)]) == 0
    rough = json.loads(capsys.readouterr().out)
    assert not any(value["stages"] for value in rough["values"]), "rated by sums, without plans"
    texts = [element.text for element in ElementTree.parse(drawn).getroot().iter() if element.text]
    for device in members:
        assert sum(text.startswith(f"{device}: coalition ") for text in texts) == 1


def test_schedules_are_listed_with_the_solvers(capsys):
    assert main(["solvers", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["schedules"])[:4] == ["gpipe", "1f1b", "eager", "zb-h1"]
    assert main(["solvers"]) == 0
    assert "zb-h1" in capsys.readouterr().out


def test_all_solvers_are_compared_on_one_crowd_and_model(tmp_path, capsys):
    path, drawn = tmp_path / "crowd.toml", tmp_path / "solvers.svg"
    assert main(["crowd", "lab_shelf", "--devices", "3", "-o", str(path)]) == 0
    capsys.readouterr()
    argv = ["solvers", str(path), "--model", "mlp", "--svg", str(drawn)]
    assert main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    by_name = {row["solver"]: row for row in rows}
    assert set(by_name) == set(solvers())
    steps = [row["step_s"] for row in rows if row["step_s"] is not None]
    assert steps == sorted(steps)
    assert by_name["eager"]["schedule"] == "eager"
    assert by_name["ilp"]["optimal"]
    for row in rows:
        assert (row["plan"] is None) == bool(row["refusal"])
    texts = [element.text for element in ElementTree.parse(drawn).getroot().iter() if element.text]
    assert set(by_name) <= set(texts)
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "of the best" in told
    assert "1.00" in told


def test_counts_recomputation_casts_and_the_medium_are_options_of_plan(tmp_path, capsys):
    argv = ["plan", "--model", "mlp", "--speeds", "1,0.5", "--batch-size", "32", "--json"]
    argv += ["--microbatches", "4", "--medium", "half_duplex", "--solver", "auto"]
    lossy = ["--recompute", "auto", "--wire-dtype", "bfloat16", "--use-all"]
    assert main([*argv, *lossy]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [stage.get("wire_dtype") for stage in said["plan"]["stages"]] == ["bfloat16", None]
    assert said["tried"] == []
    assert main([*argv, *lossy, "--try-microbatches", "2,4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [tried["microbatches"] for tried in said["tried"]] == [2, 4]
    assert said["predicted"]["step_s"] == min(tried["step_s"] for tried in said["tried"])
    assert said["plan"]["microbatches"] in (2, 4)
    assert main([*argv[:-4], "--solver", "auto", "--try-microbatches", "2,x"]) == 2
    assert "--try-microbatches must be counts" in capsys.readouterr().err


def test_a_crowd_file_keeps_its_medium(tmp_path, capsys):
    path = tmp_path / "crowd.toml"
    argv = ["crowd", "campus", "--devices", "4", "--medium", "shared_cell", "-o", str(path)]
    assert main(argv) == 0
    assert Crowd.load(path).medium == "shared_cell"
