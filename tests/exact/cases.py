"""The exactness matrix and a pairwise covering subset of it. Knows no JAX."""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass

FAMILIES = (
    "mlp", "lenet", "gpt2", "shared", "masked", "unet_skip", "lstm", "moe", "nnx_batchnorm",
    "bf16",
)  # fmt: skip
SCHEDULES = ("gpipe", "1f1b", "eager")
TRANSPORTS = ("memory", "grpc")
STAGES = (1, 2, 3, 4)
RECOMPUTE = (False, True)


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """One cell of the matrix."""

    family: str
    stages: int
    recompute: bool
    schedule: str
    transport: str

    def __str__(self) -> str:
        how = "recompute" if self.recompute else "kept"
        return f"{self.family}-S{self.stages}-{how}-{self.schedule}-{self.transport}"


def full_matrix() -> list[Case]:
    """Every combination; those that share programs stand together."""
    factors = (FAMILIES, STAGES, RECOMPUTE, SCHEDULES, TRANSPORTS)
    return [Case(*cell) for cell in itertools.product(*factors)]


def pairs_of(case: Case) -> set[tuple[int, object, int, object]]:
    """All pairs of factor values that a case covers."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(astuple(case)), 2)}


def pairwise() -> list[Case]:
    """A small set in which every pair of values of any two factors occurs (greedy)."""
    matrix = full_matrix()
    missing = set().union(*map(pairs_of, matrix))
    chosen = []
    while missing:
        best = max(matrix, key=lambda case: len(pairs_of(case) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return sorted(chosen)
