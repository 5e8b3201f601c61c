"""A stage as an agent holds it: programs, worker, rows, and what rides up with a step's last B."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..data import ShippableSource, source_from_spec
from ..errors import BundleError
from ..execution import Pace, StageWorker, warm_up
from ..programs import ProgramCache, bundle_from_arrays, load_stage
from ..protocol import messages as msg
from .envelope import EVALUATION, Group, Key
from .rows import Rows


class HeldStage:
    """What LoadStage made. All methods but the constructor's run on the compute thread."""

    def __init__(
        self,
        worker: StageWorker,
        rows: Rows,
        eval_rows: Rows | None,
        lending_layers: dict[str, int],
    ) -> None:
        self.worker = worker
        self.rows = rows
        self.eval_rows = eval_rows
        """Of the evaluation set, by microbatch; None where the run has no evaluation."""
        self.compiled_s = 0.0
        """What compiling took when it was loaded."""
        self.parts: dict[Key, Any] = {}
        """Of the step just finished: own and later stages', for Reduce on stage 0."""
        manifest = worker.manifest
        self.y_keys = [leaf.key for leaf in manifest.boundary_out]
        self.dx_keys = [leaf.key for leaf in manifest.gradient_out]
        self.borrowed_keys = {("borrowed", *path) for path in manifest.borrows}
        self._lends = {("tied_grad", *path) for path in manifest.lends}
        self._lending_layers = lending_layers

    @classmethod
    def load(
        cls,
        install: msg.Install,
        version: int,
        arrays: dict[Key, Any],
        extra: Mapping[str, Any],
        ask: Callable[..., Any],
        is_reachable: Callable[[], bool],
        known: ProgramCache | None = None,
    ) -> HeldStage:
        """Checks and compiles what an Install frame brought, and puts its state in place.

        Args:
            version: Of the state in `arrays`.
            arrays: Emptied on the way, so that what was installed is not held twice.
            ask, is_reachable: See `Rows`.
            known: Programs that this process has loaded before.

        Raises:
            BundleError: Damaged, incomplete or for another plan.
        """
        manifest_json = extra.get("manifest")
        if not isinstance(manifest_json, str):
            raise BundleError("Install came without a manifest")
        programs = {k[1]: v for k, v in arrays.items() if k[0] == "program"}
        bundle = bundle_from_arrays(manifest_json, programs)
        manifest = bundle.manifest
        stage = install.plan.stages[install.stage]
        if (manifest.stage, manifest.first_layer, manifest.last_layer) != (
            install.stage, stage.first_layer, stage.last_layer,
        ) or manifest.plan_sha256 != install.plan.digest():  # fmt: skip
            raise BundleError(f"stage {install.stage}: the bundle is for another plan")
        loaded = load_stage(bundle, cache=known)
        began_s = time.monotonic()
        loaded.compile(leave_out=() if install.evaluation else ("eval_forward",))
        warm_up(manifest)
        compiled_s = time.monotonic() - began_s
        worker = StageWorker(loaded)
        for leaf in manifest.resident:
            if leaf.role == "borrowed" and leaf.key not in arrays:
                # Copies have none: the owner lends them anew before anything is computed.
                arrays[leaf.key] = np.zeros(leaf.shape, leaf.dtype)
        worker.install(arrays, version, consume=True)
        rows = Rows(
            microbatches=install.plan.microbatches,
            has_inputs=worker.is_first,
            has_targets=worker.is_last,
            source=_shipped_source("data", arrays, extra),
            ask=ask,
            is_reachable=is_reachable,
        )
        eval_rows = None
        if install.evaluation is not None:
            eval_rows = Rows(
                microbatches=1,  # what it calls a step is a microbatch of the evaluation
                has_inputs=worker.is_first,
                has_targets=worker.is_last,
                source=_shipped_source("eval_data", arrays, extra),
                ask=lambda microbatch: ask(microbatch, EVALUATION),
                is_reachable=is_reachable,
            )
        names = {name: manifest.first_layer + i for i, name in enumerate(manifest.layer_names)}
        held = cls(worker, rows, eval_rows, {name: names[name] for name, _ in manifest.lends})
        held.compiled_s = compiled_s
        return held

    @property
    def temp_bytes(self) -> tuple[int, int]:
        """What (a forward or backward, an update) needs beside its arrays, from the compiler."""
        loaded = self.worker.loaded
        needs = {name: loaded.program(name).temp_bytes or 0 for name in loaded.names}
        del needs["eval_forward"]
        update_bytes = needs.pop("update", 0)
        return max(needs.values(), default=0), update_bytes

    def finish_step(self, below: Mapping[Key, Any]) -> tuple[Group, dict[str, float], bool, bool]:
        """Merges, makes scalars. Returns (parts for upstream, values, is_finite, has_weight)."""
        worker = self.worker
        cuts = worker.finish_step({k: v for k, v in below.items() if k in self._lends})
        parts = {k: v for k, v in below.items() if k not in self._lends}
        parts.update(worker.tied_gradients(below))
        parts.update(cuts)
        self.parts = parts
        if not worker.is_last:
            return parts, {}, True, True
        totals = worker.totals
        values = {"loss": float(totals.loss)}
        for name, (total, count) in totals.metrics.items():
            values[name] = total / count if count else float("nan")
        return parts, values, totals.is_finite, bool(totals.weight > 0)

    def apply(self, verdict: Group, skip: bool) -> Mapping[int, Group]:
        """Takes the next version. Returns what is lent to later stages, per lending layer."""
        self.worker.apply(verdict, skip=skip)
        return self.lent()

    def lent(self) -> Mapping[int, Group]:
        """What later stages borrow, per lending layer."""
        tied: dict[int, dict[Key, Any]] = {}
        for key, value in self.worker.lent().items():
            # A copy: the next update donates the parameter, perhaps before this was sent.
            tied.setdefault(self._lending_layers[key[1]], {})[key] = np.array(value)
        return tied

    async def ask_rows_again(self) -> None:
        """The coordinator is back: what was asked of the one before may have been lost."""
        for rows in (self.rows, self.eval_rows):
            if rows is not None:
                await rows.ask_again()

    def rewind(self, step: int, *, gradient: bool) -> None:
        """Forgets the rows of `step` and later, and perhaps all work on the step at hand."""
        self.rows.drop_from(step)
        if self.eval_rows is not None:
            self.eval_rows.drop_from(0)
        if gradient:
            self.worker.drop_work()

    def measure(self, pace: Pace, repeats: int) -> dict[str, float]:
        """Median seconds of each program, alone, on made-up inputs."""
        return dict(self.worker.measure(pace, repeats))


def _shipped_source(name: str, arrays: Group, extra: Mapping[str, Any]) -> ShippableSource | None:
    """The copy of a source that Install brought under `name`; None: rows are asked for."""
    if not isinstance(extra.get(name), str):
        return None
    data = {k[1]: np.asarray(v) for k, v in arrays.items() if k[0] == name}
    return source_from_spec(json.loads(extra[name]), data)
