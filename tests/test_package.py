"""The package as a whole: a light import, complete names, and rooms that keep their order."""

import ast
import inspect
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import crowdmesh_jax as cm
from crowdmesh_jax import errors

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "crowdmesh_jax"
HEAVY = ("jax", "flax", "optax", "grpc", "pulp", "matplotlib")

AGENT_SIDE = "data programs protocol execution transport record"
MAY_IMPORT = {
    "core": "",
    "crowds": "",
    "data": "",
    "model": "data",
    "programs": "",
    "export": "model programs",
    "protocol": "",
    "execution": "programs data",
    "reference": "export execution model programs data",
    "profiling": "export execution model",
    "solvers": "",
    "mobility": "",
    "propagation": "mobility solvers",
    "control": "protocol solvers mobility propagation",
    "transport": "",
    "record": "protocol",
    "simulation": "execution export record propagation mobility solvers protocol",
    "agent": AGENT_SIDE,
}
ABOVE = " ".join(MAY_IMPORT)
MAY_IMPORT |= {"runtime": ABOVE, "report": "record", "cli": f"{ABOVE} runtime report"}
"""The table of docs/architecture.md; all may import `errors` and `core` too."""

NEVER = {
    "errors": HEAVY,
    "core": HEAVY,
    "crowds": HEAVY,
    "mobility": HEAVY,
    "propagation": HEAVY,
    "control": HEAVY,
    "simulation": HEAVY,
    **dict.fromkeys(["agent", *AGENT_SIDE.split()], ("flax", "optax", "pulp")),
}
"""Third-party packages that a room must not even import late."""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_bare_import_loads_nothing_heavy_and_takes_no_time():
    code = (
        "import time, sys, json; start = time.perf_counter(); import crowdmesh_jax\n"
        "took = time.perf_counter() - start; dir(crowdmesh_jax)\n"
        "print(json.dumps([took, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    runs = [json.loads(_python(code)) for _ in range(5)]
    assert min(took for took, _ in runs) <= 0.15
    assert not set(HEAVY) & set(runs[0][1])


def test_all_names_are_sorted_found_listed_and_documented():
    assert cm.__all__ == sorted(set(cm.__all__))
    assert set(cm.__all__) <= set(dir(cm))
    for name in cm.__all__:
        value = getattr(cm, name)
        if name != "__version__":
            assert inspect.getdoc(value), f"cm.{name} has no docstring"
            if inspect.isclass(value):  # dataclasses write a docstring of their own
                assert not (value.__doc__ or "").startswith(f"{value.__name__}("), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        cm.nonsense  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((SRC / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = [
        alias.asname for node in block.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]  # fmt: skip
    assert sorted([*told, "__version__"]) == cm.__all__


def test_rooms_export_sorted_names_that_exist():
    for path in sorted(SRC.glob("*/__init__.py")):
        room = __import__(f"crowdmesh_jax.{path.parent.name}", fromlist=["x"])
        names = getattr(room, "__all__", [])
        # Constants, classes, functions: the linter's order.
        kinds = {name: (not name.isupper(), not name[0].isupper(), name) for name in names}
        assert list(names) == sorted(kinds, key=kinds.__getitem__), path.parent.name
        assert all(hasattr(room, name) for name in names), path.parent.name
        assert room.__doc__ or not names, path.parent.name


@pytest.mark.parametrize("module", ["reference", "report", "runtime.train", "data.digits"])
def test_importing_a_module_does_not_hide_the_function_of_its_name(module):
    name = module.rpartition(".")[2]
    out = _python(f"import crowdmesh_jax.{module}, crowdmesh_jax as cm; print(callable(cm.{name}))")
    assert out.strip() == "True"


def test_a_missing_dependency_is_told_with_the_install_line():
    code = (
        "import sys; sys.modules['flax'] = None; import crowdmesh_jax as cm\n"
        "try: cm.zoo\n"
        "except cm.errors.MissingExtraError as exc: print(exc)"
    )
    assert "[CM-601] cm.zoo needs flax" in _python(code)
    assert "pip install crowdmesh-jax" in _python(code)


def _room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def _imports(path: Path):
    """(room, None) for our own, (None, package) for others; of the whole file, late ones too."""
    here = ["crowdmesh_jax", *path.relative_to(SRC).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # `from .. import x`: x may be a room
            targets = [[*base, a.name] for a in node.names] if len(base) == 1 else [base]
        else:
            continue
        for target in targets:
            if target[0] != "crowdmesh_jax":
                yield None, target[0]
            elif len(target) > 1:
                yield target[1], None


def test_rooms_import_only_what_the_architecture_allows():
    faults, seen = [], set()
    for path in sorted(SRC.rglob("*.py")):
        room = _room(path)
        if room == "__init__":
            continue
        seen.add(room)
        if room != "errors":
            assert room in MAY_IMPORT, f"{path}: room {room!r} is not in the table"
        allowed = {room, "errors"} | (
            {"core"} | set(MAY_IMPORT[room].split()) if room != "errors" else set()
        )
        for own, other in _imports(path):
            if own is not None and own not in allowed and own != "__version__":
                faults.append(f"{path.relative_to(SRC)} imports {own}")
            if other in NEVER.get(room, ()):
                faults.append(f"{path.relative_to(SRC)} imports {other}")
    assert not faults
    assert {"core", "data", "agent", "runtime", "cli"} <= seen


def test_the_import_walk_sees_every_spelling(tmp_path, monkeypatch):
    room = tmp_path / "core"
    room.mkdir()
    path = room / "x.py"
    path.write_text(
        "from ..model import a\nfrom .. import data\nimport crowdmesh_jax.export\n"
        "def f():\n    from crowdmesh_jax.agent.rows import y\n    import flax.linen\n"
        "from . import values\nfrom .crowd import Crowd\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "SRC", tmp_path)
    assert list(_imports(path)) == [
        ("model", None), ("data", None), ("export", None), ("core", None), ("core", None),
        ("agent", None), (None, "flax"),
    ]  # fmt: skip


def test_the_document_draws_the_same_table():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z]+)(?:/|\.py)` \|[^|]*\|([^|]*)\|", text, re.MULTILINE))
    for room, allowed in MAY_IMPORT.items():
        if room in rows:
            told = rows[room].strip()
            if told in ("all above", "all"):
                continue
            assert set(re.findall(r"\w+", told)) == set(allowed.split()), room
    assert set(MAY_IMPORT) == set(rows), "rooms missing in docs/architecture.md"


def _error_kinds(kind=errors.CrowdMeshError):
    return {kind}.union(*map(_error_kinds, kind.__subclasses__()))


def test_error_codes_are_unique_drawn_and_documented():
    kinds = {kind for kind in _error_kinds() if kind.__module__ == errors.__name__}
    codes = [kind.code for kind in kinds]
    assert len(set(codes)) == len(codes)
    drawing, page = errors.__doc__ or "", (ROOT / errors.DOCS_PAGE).read_text()
    headings = re.findall(r"^### (CM-\d{3}) (\w+)$", page, re.MULTILINE)
    told = {kind.code: kind.__name__ for kind in kinds}
    assert dict(headings) == told
    assert len(headings) == len(told)
    for kind in kinds - {errors.CrowdMeshError}:
        number = f"{kind.code[:4]}xx" if kind.code.endswith("00") else kind.code
        assert re.search(rf"{kind.__name__} +{number}", drawing), kind.__name__
    for body in re.split(r"^### .*$", page, flags=re.MULTILINE)[1:]:
        assert len(body.split()) > 5, "an entry without text"


def test_the_console_script_and_the_version_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"crowdmesh": "crowdmesh_jax.cli:main"}
    from crowdmesh_jax.cli import main

    assert callable(main)
    assert re.fullmatch(r"\d+\.\d+\.\d+", cm.__version__)
    assert f"## {cm.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {cm.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_each_dependency_bound_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    lines = re.findall(r'^  "[a-z][\w\[\]-]*[><=].*$', text, re.MULTILINE)
    assert len(lines) >= 15
    assert [line for line in lines if not re.search(r"# .{10,}", line)] == []


def test_agents_need_only_what_the_package_needs():
    """Each bound of requirements-agent.txt that the package states too is the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"])  # pyright: ignore
    text = (ROOT / "requirements-agent.txt").read_text()
    agents = dict(re.findall(r"^([\w-]+)([^\s#]*)", text, re.MULTILINE))
    assert not {"flax", "optax", "pulp", "highspy", "rich"} & set(agents)
    for name in ("jax", "numpy", "grpcio", "flatbuffers", "safetensors"):
        assert agents[name] == ours[name]
    assert agents["jaxlib"] == agents["jax"]


TOLD_TO_USERS = (
    "TrainResult", "TrainState", "Evaluation", "PhaseEvent", "MeasuredEvent", "DeviceEvent",
    "StepEvent", "EvaluationEvent", "BestEvent", "CheckpointEvent",
)  # fmt: skip
"""Values that a user gets of a run, and reads by field."""


@pytest.mark.parametrize("name", TOLD_TO_USERS)
def test_what_a_run_tells_is_documented_by_field_and_in_the_reference(name):
    kind = getattr(cm, name)
    (body,) = [
        node.body
        for node in ast.parse(Path(inspect.getsourcefile(kind)).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    fields = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    told = {
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert [field for field in fields if field not in told] == []
    reference = (ROOT / "docs" / "api.md").read_text()
    assert f".. autoclass:: crowdmesh_jax.{name}\n   :members:\n" in reference
