"""Runs one stage's programs: resident arrays, slots for microbatches in flight, the step's ledger.

It knows programs by their manifest only: inputs are looked up and outputs filed by
(role, layer, path). It has no threads, sockets or clock; whoever drives it decides the order, and
the protocol decides when `apply` is allowed. Everything that happens in a step works on copies
(`work` statistics, accumulators) until `apply`, so that dropping a step needs no undoing
(PROTOCOL.md, R5).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import BundleError, DataError, ProtocolError
from ..programs import LoadedStage
from ..programs.manifest import LeafSpec, StageManifest
from .pace import Pace, measure_programs

Key = tuple[str, str, str]
Array = Any

SEED: Key = ("seed", "", "")
STEP: Key = ("step", "", "")
MICROBATCH: Key = ("microbatch", "", "")
INV_WEIGHT: Key = ("inv_weight", "", "")


@dataclass(slots=True)
class StepTotals:
    """What the last stage learned of a step."""

    loss: np.float32 = field(default_factory=lambda: np.float32(0))
    weight: np.float32 = field(default_factory=lambda: np.float32(0))
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.loss))


@dataclass(slots=True)
class _EvaluationSums:
    """Sums over microbatches, in double precision: the set may have many."""

    loss: float = 0.0
    weight: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def add(self, out: Mapping[Key, Array]) -> None:
        for (role, _, path), value in out.items():
            if role == "loss":
                self.loss += float(value)
            elif role == "weight":
                self.weight += float(value)
            elif role == "metric":
                name, _, which = path.rpartition("/")
                self.metrics.setdefault(name, [0.0, 0.0])[which != "sum"] += float(value)

    def means(self) -> dict[str, float]:
        pairs = {"loss": (self.loss, self.weight), **self.metrics}
        return {
            name: total / count if count else float("nan") for name, (total, count) in pairs.items()
        }


def warm_up(manifest: StageManifest) -> None:
    """Compiles what JAX makes for each shape that a worker puts in place or sets to zero.

    Small programs, but tens of them: who takes a stage over must not wait for them.
    """
    import jax.numpy as jnp

    for shape, dtype in {(leaf.shape, leaf.dtype) for leaf in manifest.resident}:
        jnp.array(np.zeros(shape, jnp.dtype(dtype)), copy=True)
    for shape, dtype in {(leaf.shape, leaf.dtype) for leaf in manifest.accumulators}:
        jnp.zeros(shape, dtype)


class StageWorker:
    """One stage at one version, and the partial work on the next.

    Args:
        loaded: The stage's checked programs.
    """

    def __init__(self, loaded: LoadedStage) -> None:
        self.loaded = loaded
        self.manifest: StageManifest = loaded.manifest
        self.version = -1
        self.totals = StepTotals()
        self._evaluated = _EvaluationSums()
        self._resident: dict[Key, Array] = {}
        self._state: dict[Key, Array] = {}
        self._work_state: dict[Key, Array] = {}
        self._gradients: dict[Key, Array] = {}
        self._slots: dict[int, dict[Key, Array]] = {}
        self._targets: dict[int, dict[Key, Array]] = {}
        self._cuts: dict[Key, Array] = {}
        self._inv_weight = np.float32(0)
        manifest = self.manifest
        self.is_first = manifest.stage == 0
        self.is_last = manifest.stage == manifest.num_stages - 1
        self._seed = np.uint32(manifest.seed % 2**32)
        self._x_keys = [leaf.key for leaf in manifest.boundary_in]
        self._y_keys = [leaf.key for leaf in manifest.boundary_out]
        self._dy_keys = [leaf.key for leaf in manifest.gradient_in]
        self._dx_keys = [leaf.key for leaf in manifest.gradient_out]
        self._target_keys = [leaf.key for leaf in manifest.targets]

    # Installing ------------------------------------------------------------------------------

    def install(self, arrays: Mapping[Key, Array], version: int, *, consume: bool = False) -> None:
        """Copies parameters, optimizer state, statistics, globals and borrowed leaves.

        Args:
            consume: Takes each out of `arrays`, a dict, once it is copied: if nobody else holds
                them, the stage's state is in memory once and not twice.

        Raises:
            BundleError: A leaf is missing or of another shape or dtype than the manifest says.
        """
        import jax.numpy as jnp

        resident: dict[Key, Array] = {}
        for spec in self.manifest.resident:
            if spec.key not in arrays:
                raise BundleError(f"stage {self.manifest.stage}: no array for {_name(spec)}")
            array = arrays[spec.key]
            _check_leaf(spec, array, f"stage {self.manifest.stage}")
            # A copy that jax owns: update overwrites these buffers in place. Adopted numpy memory
            # could not be overwritten, and the first update would hold the state twice.
            resident[spec.key] = jnp.array(array, copy=True)
            if consume:
                assert isinstance(arrays, dict), "only a dict can be consumed"
                del arrays[spec.key], array
        self._state = {k: v for k, v in resident.items() if k[0] == "state"}
        self._resident = {k: v for k, v in resident.items() if k[0] != "state"}
        self.version = version
        self._begin_step()

    def _begin_step(self) -> None:
        import jax.numpy as jnp

        self._work_state = dict(self._state)
        self._slots.clear()
        self._targets.clear()
        self._cuts = {}
        self.totals = StepTotals()
        self._gradients = {}  # let go of the old ones before new ones are made
        self._gradients = {
            spec.key: jnp.zeros(spec.shape, spec.dtype) for spec in self.manifest.accumulators
        }

    def drop_work(self) -> None:
        """Forgets all partial work: the version that stands is untouched by it (R5)."""
        self._evaluated = _EvaluationSums()
        self._begin_step()

    # The step --------------------------------------------------------------------------------

    def load_targets(self, targets: Sequence[Sequence[Array]]) -> None:
        """Takes the targets of all microbatches of a step and weighs them (last stage only)."""
        if not self.is_last:
            raise ProtocolError(f"stage {self.manifest.stage} is not the last and has no targets")
        total = np.float32(0)
        for microbatch, leaves in enumerate(targets):
            _check_leaves(self.manifest.targets, leaves, "targets")
            env = dict(zip(self._target_keys, leaves, strict=True))
            self._targets[microbatch] = env
            weight = self.loaded.run("weigh", env)[("weight", "", "")]
            total = np.float32(total + np.float32(weight))
        if not np.isfinite(total) or total < 0:
            raise DataError(f"step {self.version}: the sum of loss weights is {total}")
        self.totals.weight = total
        self._inv_weight = np.float32(1) / total if total > 0 else np.float32(0)

    @property
    def has_targets(self) -> bool:
        """Whether this step's targets were loaded and weighed."""
        return bool(self._targets)

    def forward(self, microbatch: int, x: Sequence[Array]) -> list[Array]:
        """Runs one forward; returns the boundary leaves that go downstream.

        On the last stage only the input is kept: loss_backward is one program.
        """
        _check_leaves(self.manifest.boundary_in, x, "x")
        slot: dict[Key, Array] = dict(zip(self._x_keys, x, strict=True))
        self._slots[microbatch] = slot
        if self.is_last:
            return []
        env = {**self._resident, **self._work_state, **slot, **self._scalars(microbatch)}
        out = self.loaded.run("forward", env)
        result = []
        for key, value in out.items():
            if key[0] == "residual":
                slot[key] = value
            elif key[0] == "state":
                self._work_state[key] = value
        for key in self._y_keys:
            result.append(out[key])
        return result

    def backward(self, microbatch: int, dy: Sequence[Array] = ()) -> list[Array]:
        """Runs one backward (loss and backward on the last stage); returns what goes upstream."""
        slot = self._slots.pop(microbatch)
        env = {**self._resident, **slot, **self._gradients, **self._scalars(microbatch)}
        if self.is_last:
            env.update(self._work_state)
            env.update(self._targets[microbatch])
            env[INV_WEIGHT] = self._inv_weight
            out = self.loaded.run("loss_backward", env)
        else:
            _check_leaves(self.manifest.gradient_in, dy, "dy")
            env.update(zip(self._dy_keys, dy, strict=True))
            out = self.loaded.run("backward", env)
        # The programs donate the accumulators: the old ones must not be touched again.
        for key, value in out.items():
            role = key[0]
            if role in ("grad", "tied_grad"):
                self._gradients[key] = value
            elif role == "state":
                self._work_state[key] = value
            elif role == "loss":
                self.totals.loss = np.float32(self.totals.loss + np.float32(value))
            elif role == "metric":
                self._count(key[2], float(value))
        return [out[key] for key in self._dx_keys]

    def _count(self, path: str, value: float) -> None:
        name, _, which = path.rpartition("/")
        total, count = self.totals.metrics.get(name, (0.0, 0.0))
        pair = (total + value, count) if which == "sum" else (total, count + value)
        self.totals.metrics[name] = pair

    def tied_gradients(self, below: Mapping[Key, Array]) -> dict[Key, Array]:
        """Summed gradients of borrowed leaves, for their owner, after the last backward.

        Args:
            below: What the stage below says of the leaves that later stages borrow. Of one that
                this stage borrows as well the sum goes up: equal orders, equal bits.
        """
        own = {key: value for key, value in self._gradients.items() if key[0] == "tied_grad"}
        return {
            key: value if key not in below else np.asarray(below[key]) + np.asarray(value)
            for key, value in own.items()
        }

    def finish_step(self, tied: Mapping[Key, Array] | None = None) -> dict[Key, Array]:
        """After the last backward: adds gradients from borrowers, makes the cut scalars.

        Returns:
            This stage's cut scalars, by key; empty where the optimizer mixes no layers.
        """
        if self.loaded.has("merge"):
            lent = {("tied_grad", *path): None for path in self.manifest.lends}
            missing = [key for key in lent if tied is None or key not in tied]
            if missing:
                raise ProtocolError(f"no gradient from the borrower of {missing[0][1:]}")
            env = {**self._gradients, **{k: v for k, v in (tied or {}).items() if k in lent}}
            self._gradients.update(self.loaded.run("merge", env))
        if not self.loaded.has("scalars"):
            return {}
        self._cuts = self.loaded.run("scalars", {**self._resident, **self._gradients})
        return self._cuts

    def reduce(self, cuts: Mapping[Key, Array]) -> dict[Key, Array]:
        """Stage 0, from all layers' cut scalars: new optimizer globals and what update shares."""
        if not self.loaded.has("reduce"):
            return {}
        return self.loaded.run("reduce", {**self._resident, **cuts})

    def apply(self, values: Mapping[Key, Array], *, skip: bool = False) -> None:
        """Takes version t to t+1: only past the commit point.

        Args:
            values: What `reduce` returned, from Commit.
            skip: The step is counted but changes nothing (non-finite loss, zero weight).
        """
        if not skip:
            env = {**self._resident, **self._gradients, **values}
            # Old globals go in under their own key; the new ones replace them afterwards.
            for key in values:
                if key[0] == "global":
                    env[key] = self._resident[key]
            out = self.loaded.run("update", env)
            self._resident.update(out)
            self._resident.update({k: v for k, v in values.items() if k[0] == "global"})
            self._state = dict(self._work_state)
            del env, out  # they hold the gradients
        self.version += 1
        self._begin_step()

    # Evaluation ------------------------------------------------------------------------------

    def evaluate(self, x: Sequence[Array], targets: Sequence[Array] | None = None) -> list[Array]:
        """Runs `eval_forward` on one microbatch at the version that stands; changes nothing of it.

        Args:
            targets: On the last stage only.

        Returns:
            The boundary leaves that go downstream; nothing on the last stage, which adds to the
            sums of `finish_evaluation`.
        """
        _check_leaves(self.manifest.boundary_in, x, "x")
        env = {**self._resident, **self._state, **dict(zip(self._x_keys, x, strict=True))}
        if not self.is_last:
            out = self.loaded.run("eval_forward", env)
            return [out[key] for key in self._y_keys]
        _check_leaves(self.manifest.targets, targets or (), "targets")
        env.update(zip(self._target_keys, targets or (), strict=True))
        self._evaluated.add(self.loaded.run("eval_forward", env))
        return []

    def finish_evaluation(self) -> dict[str, float]:
        """The means since the last call: "loss" and the metrics; NaN where nothing was counted."""
        values = self._evaluated.means()
        self._evaluated = _EvaluationSums()
        return values

    # Reading ---------------------------------------------------------------------------------

    def set_borrowed(self, values: Mapping[Key, Array]) -> None:
        """Takes the owner's new values of borrowed leaves."""
        self._resident.update(values)

    def lent(self) -> dict[Key, Array]:
        """Own leaves that later stages borrow, keyed as the borrower keeps them."""
        return {
            ("borrowed", *path): self._resident[("param", *path)] for path in self.manifest.lends
        }

    def snapshot(self) -> dict[Key, np.ndarray]:
        """All that this stage owns at its version (params, optimizer, statistics), as views.

        They stay as they are: an update that finds a view on what it is to overwrite writes its
        result elsewhere. So a snapshot costs memory only if an update comes before it is let go.
        """
        arrays = {**self._resident, **self._state}
        return {k: np.asarray(v) for k, v in arrays.items() if k[0] != "borrowed"}

    def measure(self, pace: Pace, repeats: int) -> Mapping[str, float]:
        """Median seconds of each program, between two steps; see `measure_programs`.

        Programs read the stage's own arrays and overwrite its accumulators, which then start at
        zero again. That an update makes them anew counts as a part of it.
        """
        scratch, self._gradients = self._gradients, {}
        try:
            seconds = measure_programs(
                self.loaded,
                pace,
                repeats=repeats,
                given={**self._resident, **self._state},
                scratch=scratch,
            )
        finally:
            scratch.clear()
            self._begin_step()
        begun = [pace.run(self._begin_step) for _ in range(repeats)]
        begin_s = statistics.median(timed.end_s - timed.start_s for timed in begun)
        return {**seconds, "update": seconds.get("update", 0.0) + begin_s}

    def _scalars(self, microbatch: int) -> dict[Key, Any]:
        return {
            SEED: self._seed,
            STEP: np.uint32(self.version),
            MICROBATCH: np.uint32(microbatch),
        }


def _name(spec: LeafSpec) -> str:
    return f"{spec.role} {spec.layer}/{spec.path}"


def _check_leaf(spec: LeafSpec, array: Any, where: str) -> None:
    if tuple(array.shape) != spec.shape or str(array.dtype) != spec.dtype:
        raise BundleError(
            f"{where}: {_name(spec)} must be {spec.dtype}{list(spec.shape)},"
            f" got {array.dtype}{list(array.shape)}"
        )


def _check_leaves(specs: Sequence[LeafSpec], arrays: Sequence[Any], where: str) -> None:
    if len(specs) != len(arrays):
        raise BundleError(f"{where}: expected {len(specs)} arrays, got {len(arrays)}")
    for spec, array in zip(specs, arrays, strict=True):
        _check_leaf(spec, array, where)
