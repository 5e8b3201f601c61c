"""Every example runs, a few steps each, and ends with what it reached beside its reference."""

import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import crowdmesh_jax as cm

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        not (DATA / "har.npz").exists() and not (EXAMPLES.parent / ".git").exists(),
        reason="the source archive has no example data",
    ),
]

SMALL = {
    "audio_digits": ["--steps", "2"],
    "digits_cnn": ["--steps", "2"],
    "har_cnn": ["--steps", "2"],
    "own_model": ["--steps", "2"],
    "own_optimizer_and_loss": ["--steps", "2"],
    "shakespeare_lm": ["--steps", "2", "--batch-size", "4", "--test-rows", "4"],
}
LONG = {
    "fashion_mobilenet": ["--steps", "2", "--width", "0.1", "--batch-size", "4"],
}
QUICK = ("har_cnn", "own_optimizer_and_loss")
"""What CI has time for; `make long` runs all, in one process and over several."""
REACHED = re.compile(r"^test (accuracy|loss) ([\d.]+).* \(.*reference: .*\d.*\)$", re.MULTILINE)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_fashion(folder: Path, rows: int = 16) -> None:
    for stem in ("train", "t10k"):
        for name, shape in (("images-idx3", (rows, 28, 28)), ("labels-idx1", (rows,))):
            head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            values = (np.arange(np.prod(shape)) % 10).astype(np.uint8)
            (folder / f"{stem}-{name}-ubyte").write_bytes(head + values.tobytes())


def run_here(name: str, arguments: list[str], monkeypatch, tmp_path, capsys) -> str:
    monkeypatch.chdir(tmp_path)
    load(EXAMPLES / f"{name}.py").main(
        [*arguments, "--transport", "memory", "--speeds", "1", "0.5"]
    )
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SMALL],
)
def test_an_example_says_what_it_reached_beside_its_reference(name, monkeypatch, tmp_path, capsys):
    out = run_here(name, SMALL[name], monkeypatch, tmp_path, capsys)
    assert REACHED.search(out), out
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.long
def test_fashion_mobilenet_runs_on_files_of_its_format(monkeypatch, tmp_path, capsys):
    write_fashion(tmp_path)
    arguments = [*LONG["fashion_mobilenet"], "--data", str(tmp_path)]
    assert REACHED.search(run_here("fashion_mobilenet", arguments, monkeypatch, tmp_path, capsys))


@pytest.mark.long
@pytest.mark.parametrize("name", [*SMALL, *LONG])
def test_an_example_runs_as_its_text_says_over_processes(name, tmp_path):
    arguments = SMALL.get(name) or [*LONG[name], "--data", str(tmp_path)]
    write_fashion(tmp_path)
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert REACHED.search(done.stdout), done.stdout


def test_no_example_is_forgotten_and_each_is_under_a_page_and_in_the_table():
    table = (EXAMPLES / "README.md").read_text()
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*SMALL, *LONG}
    for name in found:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 110, name
        assert f"python examples/{name}.py" in table, name


def test_without_its_data_an_example_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {
        "fashion_mobilenet": (["--data", "none"], "apt install dataset-fashion-mnist"),
        "har_cnn": (["--data", "none"], "comes with the repository, in examples/data"),
        "shakespeare_lm": (["--text", "none"], "a text of your own with --text"),
        "audio_digits": (["--wav", "none"], "clone Jakobovski/free-spoken-digit-dataset"),
    }
    for name, (arguments, message) in cases.items():
        with pytest.raises(cm.errors.DataFileError, match=message):
            load(EXAMPLES / f"{name}.py").main(arguments)


def test_the_bundled_data_is_what_its_readme_says_and_is_small():
    with np.load(DATA / "har.npz", allow_pickle=False) as har:
        assert len(har["runs"]) == 446
        assert set(har["runs"][:, 0]) == set(range(1, 24))
        assert har["runs"][-1, 3:].sum() == len(har["x"]) == len(har["y"])
    with np.load(DATA / "spoken_digits.npz", allow_pickle=False) as clips:
        assert clips["clips"].shape == (900, 5)
        assert (clips["clips"][:, 3:].sum(axis=1)[:-1] == clips["clips"][1:, 3]).all()
        assert clips["clips"][-1, 3:].sum() == len(clips["audio"])
    text = cm.read_text(DATA / "shakespeare.txt.gz")
    assert len(text) == 1_115_394
    assert len(cm.Vocabulary.of(text)) == 65
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 5_000_000
    readme = (DATA / "README.md").read_text()
    for words in ("CC BY 4.0", "CC BY-SA 4.0", "public domain", "Matey-Sanz", "Jackson"):
        assert words in readme


def test_make_makes_the_same_kind_of_file_from_originals(tmp_path, monkeypatch):
    make = load(DATA / "make.py")
    monkeypatch.setattr(make, "HERE", tmp_path)
    folder = tmp_path / "s03"
    folder.mkdir()
    rows = [f"{i},{-i},0,1,2,{i / 10},0,{'WALKING' if i < 5 else 'TURNING'}" for i in range(9)]
    header = "x_acc,y_acc,z_acc,x_gyro,y_gyro,z_gyro,timestamp,label"
    (folder / "s03_02_sw.csv").write_text("\n".join([header, *rows]))
    make.har(tmp_path)
    with np.load(tmp_path / "har.npz") as made:
        np.testing.assert_allclose((made["x"] * made["scale"])[:, 0], [1.5, 5.5], rtol=1e-4)
        assert made["y"].tolist() == [2, 3]
        assert made["runs"].tolist() == [[3, 2, 1, 0, 2]]
