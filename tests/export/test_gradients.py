"""The gradients that stages make together are those of the whole model, kept or recomputed."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import CASES, Case

from crowdmesh_jax.export.chain import build_chain
from crowdmesh_jax.export.flat import FlatProgram
from crowdmesh_jax.export.stage import StageParts, Targets, forward_and_backward, loss_backward
from crowdmesh_jax.model.trees import get_leaf, leaf_paths

FAST = {"xla_backend_optimization_level": 0}
SEED, STEP = np.uint32(5), np.uint32(3)


def call(program: FlatProgram, env: dict[Any, Any]) -> dict[Any, Any]:
    out = program.fn(*(env[leaf.key] for leaf in program.inputs))
    return dict(zip((leaf.key for leaf in program.outputs), out, strict=True))


class Pipeline:
    """All stages of a cut, run as functions."""

    def __init__(self, case: Case, cuts: list[int], recompute: bool) -> None:
        self.job = case.job
        self.specs = case.job.microbatch_specs(case.batch(0))
        chain = build_chain(case.job.model, self.specs[0])
        targets = Targets.of(jax.tree.map(lambda s: s, self.specs[1]))
        bounds = [0, *cuts, len(chain.layers)]
        self.parts = [
            StageParts(chain, first, end - 1) for first, end in itertools.pairwise(bounds)
        ]
        self.inner = [forward_and_backward(p, recompute=recompute) for p in self.parts[:-1]]
        self.final = loss_backward(self.parts[-1], case.job, targets)

    def run(
        self, arrays: dict[Any, Any], batches: list[Any], inv: Any, seed: Any = SEED
    ) -> dict[str, Any]:
        """One step: the summed gradients, new state, loss and residuals of microbatch 0."""
        borrowed = {("borrowed", *k[1:]): v for k, v in arrays.items() if k[0] == "param"}
        env0 = {**arrays, **borrowed, ("seed", "", ""): seed, ("step", "", ""): STEP}
        sums = {
            leaf.key: jnp.zeros(leaf.shape, leaf.dtype)
            for parts in self.parts
            for leaf in parts.accumulators
        }
        state = {k: v for k, v in arrays.items() if k[0] == "state"}
        loss, residuals = jnp.float32(0), []
        for m, (inputs, wanted) in enumerate(batches):
            base = {**env0, ("microbatch", "", ""): np.uint32(m)}
            carry: list[Any] = jax.tree.leaves(inputs)
            slots = []
            for parts, (forward, _) in zip(self.parts, self.inner, strict=False):
                slot = dict(zip((leaf.key for leaf in parts.x), carry, strict=True))
                out = call(forward, {**base, **state, **slot})
                state.update((k, v) for k, v in out.items() if k[0] == "state")
                slot.update((k, v) for k, v in out.items() if k[0] == "residual")
                slots.append(slot)
                carry = [out[leaf.key] for leaf in parts.after.specs("y")]
            x = dict(zip((leaf.key for leaf in self.parts[-1].x), carry, strict=True))
            flat = enumerate(jax.tree.leaves(wanted))
            targets = {("target", "", str(i)): leaf for i, leaf in flat}
            env = {**base, **state, **x, **targets, ("inv_weight", "", ""): inv, **sums}
            out = call(self.final, env)
            loss = loss + out.pop(("loss", "", ""))
            self._file(out, state, sums)
            for i in reversed(range(len(self.inner))):
                dy = {("dy", *k[1:]): v for k, v in out.items() if k[0] == "dx"}
                out = call(self.inner[i][1], {**base, **slots[i], **dy, **sums})
                self._file(out, state, sums)
            if m == 0:
                residuals = [v for slot in slots for k, v in slot.items() if k[0] == "residual"]
        grads: dict[Any, Any] = {}
        for key, value in sums.items():
            grads[key[1:]] = value if key[1:] not in grads else grads[key[1:]] + value
        return {"grads": grads, "state": state, "loss": loss, "residuals": residuals}

    @staticmethod
    def _file(out: dict[Any, Any], state: dict[Any, Any], sums: dict[Any, Any]) -> None:
        state.update((k, v) for k, v in out.items() if k[0] == "state")
        sums.update((k, v) for k, v in out.items() if k[0] in ("grad", "tied_grad"))


def whole(case: Case, params: Any, state: Any, batches: list[Any], inv: Any) -> dict[str, Any]:
    """The same step by `jax.value_and_grad` over all microbatches at once."""

    def loss_of(params: Any) -> Any:
        now, total = state, jnp.float32(0)
        for m, (inputs, wanted) in enumerate(batches):
            y, now, aux = case.job.model.apply(
                params,
                jax.lax.stop_gradient(now),
                inputs,
                seed=SEED,
                step=STEP,
                microbatch=np.uint32(m),
                train=True,
            )
            values, weights = case.job.loss_fn(y, wanted)
            total = total + jnp.sum(values * weights) * inv
            if aux is not None:
                total = total + aux / case.job.microbatches
        return total, now

    (loss, after), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return {"grads": grads, "state": after, "loss": loss}


def microbatches(case: Case, step: int) -> list[Any]:
    rows, specs = case.job.microbatch_size, case.job.microbatch_specs(case.batch(step))
    batch = case.batch(step)
    return [
        jax.tree.map(
            lambda spec, leaf, m=m: np.asarray(leaf[m * rows : (m + 1) * rows], spec.dtype),
            specs,
            batch,
        )
        for m in range(case.job.microbatches)
    ]


SLOW = ("bf16", "lstm")  # long to compile
PARAMETERS = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]


@pytest.mark.parametrize("name", PARAMETERS)
def test_stages_make_the_gradients_of_the_whole_model(name):
    case = CASES[name]()
    layers = len(case.job.model.layers)
    kept = Pipeline(case, list(range(1, layers)), recompute=False)  # a stage per layer
    again = Pipeline(case, [2], recompute=True)
    params, state = case.job.model.init(case.job.seed, kept.specs[0])
    rng = np.random.default_rng(0)  # no zeros and ones: constants would hide what they make
    params = jax.tree.map(lambda p: p + (0.1 * rng.normal(size=p.shape)).astype(p.dtype), params)
    arrays = {
        (role, layer, path): leaf
        for role, trees in (("param", params), ("state", state))
        for layer, tree in trees.items()
        for path, leaf in leaf_paths(tree)
    }
    inv = np.float32(0.25)

    def run(arrays: Any, other: Any, params: Any, state: Any, first: Any, second: Any) -> Any:
        return (
            kept.run(arrays, first, inv),
            again.run(arrays, first, inv),
            whole(case, params, state, first, inv),
            kept.run(other, second, inv, SEED + 1)["residuals"],
        )

    other = {k: v + (0.25 if k[0] == "state" else 0) for k, v in arrays.items()}
    a, b, w, others = jax.jit(run, compiler_options=FAST)(
        arrays, other, params, state, microbatches(case, 0), microbatches(case, 1)
    )
    expected = {
        (layer, path): np.asarray(leaf, np.float32)
        for layer, tree in w["grads"].items()
        for path, leaf in leaf_paths(tree)
    }
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in expected.values()))
    # 16-bit cotangents round once per microbatch and boundary, whatever the cut.
    relative, absolute = (2e-2, 2e-3) if name == "bf16" else (1e-5, 1e-6)
    for found in (a, b):
        assert found["grads"].keys() == expected.keys()
        np.testing.assert_allclose(found["loss"], w["loss"], rtol=1e-3 if name == "bf16" else 1e-5)
        for key, leaf in expected.items():
            error = np.linalg.norm(np.asarray(found["grads"][key]) - leaf)
            assert error <= relative * np.linalg.norm(leaf) + absolute * norm, key
        for key, value in found["state"].items():
            after = get_leaf(w["state"][key[1]], key[2])
            np.testing.assert_allclose(value, after, rtol=1e-5, atol=1e-7)
    assert norm > 1e-3
    # What does not change with data, key and state depends on parameters alone: never kept.
    # Masks that happen to be full (one value everywhere) say nothing.
    fixed = [
        (v.shape, v.dtype)
        for v, o in zip(a["residuals"], others, strict=True)
        if np.array_equal(v, o) and np.unique(v).size > 1
    ]
    assert fixed == []
