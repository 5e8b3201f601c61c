"""What "bit-equal" means for two results of training."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def assert_bit_equal(result: Any, oracle: Any) -> None:
    """Same losses, and the same bytes in every leaf of params, state and optimizer state."""
    assert result.losses.tolist() == [np.float32(loss) for loss in oracle.losses]
    for part in ("params", "state", "opt_state"):
        ours, theirs = getattr(result, part), getattr(oracle, part)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs), part
        unequal = [
            jax.tree_util.keystr(path)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
            )
            if np.asarray(a).tobytes() != np.asarray(b).tobytes()
        ]
        assert not unequal, f"{part} differ"
