"""What a stage bundle contains, written so that a device can run it without knowing the model.

A program takes and returns flat lists of arrays. Each leaf is known by (role, layer, path), never
by position: the worker looks inputs up by that key and files outputs under theirs.

Roles of leaves:
    param, state, opt      owned by the stage; (layer, path) as in the model's own trees
    borrowed               read-only copy of a parameter that another stage owns (tied weights)
    global                 optimizer value that every stage keeps (counts, schedules)
    shared                 what `reduce` computed for `update` (a clipping factor, say)
    cut                    scalar per leaf that `scalars` made and `reduce` reads
    grad                   gradient accumulator, summed in microbatch order
    tied_grad              the same, for a borrowed leaf; travels to the owner
    x, dx, y, dy           boundary leaves, path "0", "1", ...; dy/dx only where gradients flow
    residual               kept from forward to backward
    seed, step, microbatch uint32 scalars; randomness depends on these and the layer only
    target, inv_weight     targets; 1 / sum of weights over all microbatches of the step
    weight, loss           sum of weights of a microbatch; its share of the step's loss
    metric                 path "NAME/sum" or "NAME/count"

Programs of a stage (`[...]`: only some stages or optimizers have it):
    forward        param borrowed state x seed step microbatch -> y residual state
                   (not on the last stage)
    backward       param borrowed x residual dy [seed step microbatch] grad [tied_grad]
                   -> [dx] grad [tied_grad]                      (not on the last stage)
    loss_backward  param borrowed state x target inv_weight seed step microbatch grad
                   -> [dx] grad state loss [metric]              (last stage only)
    weigh          target -> weight                              (last stage only)
    [merge]        grad tied_grad -> grad                        (owner of a leaf tied elsewhere)
    [scalars]      grad param opt global -> cut
    [reduce]       cut (all layers, layer order) global -> global shared     (stage 0 only)
    update         param opt grad global shared -> param opt
    eval_forward   param borrowed state x [target] -> y | loss weight [metric] y
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """One array in a program's flat inputs or outputs, or at a boundary."""

    role: str
    layer: str
    path: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.role, self.layer, self.path

    @property
    def numpy_dtype(self) -> np.dtype:
        """`dtype` for numpy, which knows bfloat16 and its like only through ml_dtypes."""
        try:
            return np.dtype(self.dtype)
        except TypeError:
            import ml_dtypes  # comes with jax

            return np.dtype(getattr(ml_dtypes, self.dtype))

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSpec:
    """One exported program of a stage."""

    name: str
    sha256: str
    size_bytes: int
    inputs: tuple[LeafSpec, ...]
    outputs: tuple[LeafSpec, ...]
    donate: tuple[int, ...] = ()
    """Indices of inputs whose buffers the call may reuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageManifest:
    """All that a device needs to know to check and run one stage."""

    format_version: int
    plan_sha256: str
    stage: int
    num_stages: int
    first_layer: int
    last_layer: int
    layer_names: tuple[str, ...]
    recompute: bool
    microbatches: int
    seed: int
    programs: tuple[ProgramSpec, ...]
    boundary_in: tuple[LeafSpec, ...]
    """x leaves, in order; on stage 0 the inputs of a microbatch."""
    boundary_out: tuple[LeafSpec, ...]
    """y leaves, in order; empty on the last stage."""
    gradient_in: tuple[LeafSpec, ...]
    """dy leaves that come back from downstream."""
    gradient_out: tuple[LeafSpec, ...]
    """dx leaves that go upstream."""
    targets: tuple[LeafSpec, ...] = ()
    resident: tuple[LeafSpec, ...] = ()
    """param, state, opt, borrowed and global leaves that Install must bring."""
    accumulators: tuple[LeafSpec, ...] = ()
    """grad and tied_grad leaves; they start each step at zero."""
    borrows: tuple[tuple[str, str], ...] = ()
    """(layer, path) of each leaf borrowed from an earlier stage."""
    lends: tuple[tuple[str, str], ...] = ()
    """(layer, path) of each own leaf that a later stage borrows."""
    calling_convention_version: int
    jax_version: str
    platforms: tuple[str, ...] = ("cpu",)
    temp_bytes_bound: int | None = None

    def program(self, name: str) -> ProgramSpec | None:
        """The program of that name, None where this stage has none."""
        return next((p for p in self.programs if p.name == name), None)
