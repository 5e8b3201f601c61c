"""A model whose state is its history: every array is a number made from all that went into it.

Any update lost, doubled, out of order, or made from another version gives another number. Rows of a
step change with each rollback that takes the step back (as rows may, section 13), so that what a
rollback made invalid differs from what replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from crowdmesh_jax.protocol import Tie

MASK = (1 << 61) - 1


def mix(*values: int) -> int:
    """A number that depends on all values and their order."""
    h = 1469598103
    for value in values:
        h = ((h ^ (value & MASK)) * 6364136223846793005 + 1442695040888963407) & MASK
        h ^= h >> 29
    return h


State = tuple[int, int]
"""(parameters and optimizer, statistics) of a layer."""


def initial(layer: int) -> State:
    return mix(7, layer), mix(11, layer)


@dataclass
class Rollbacks:
    """What the journal says of rollbacks: (epoch, base)."""

    entries: list[tuple[int, int]] = field(default_factory=list)

    def generation(self, step: int, epoch: int) -> int:
        """How often `step` was taken back, as an epoch knows it."""
        return sum(1 for at, base in self.entries if at <= epoch and base <= step)


def rows(step: int, microbatch: int, generation: int) -> int:
    return mix(13, step, microbatch, generation)


def forward(state: State, x: int) -> int:
    return mix(17, state[0], x)


def statistics(work: int, x: int) -> int:
    return mix(19, work, x)


def loss_gradient(y: int, step: int, microbatch: int) -> int:
    return mix(23, y, step, microbatch)


def backward(state: State, x: int, dy: int) -> tuple[int, int]:
    """(gradient of the layer, dx)."""
    return mix(29, state[0], x, dy), mix(31, state[0], dy)


def verdict_of(parts: dict[int, int]) -> int:
    """All layers' parts, in layer order."""
    return mix(37, *(parts[layer] for layer in sorted(parts)))


def borrow(state: State, lent: int) -> State:
    """A layer that computes with another's parameters as well."""
    return mix(61, state[0], lent), state[1]


def merge(gradient: int, partials: dict[int, int]) -> int:
    """An owner's gradient and those of its borrowers, in layer order."""
    return mix(67, gradient, *(partials[layer] for layer in sorted(partials)))


def owners_of(ties: Iterable[Tie]) -> dict[int, int]:
    """Borrowing layer -> the layer that lends."""
    return {layer: tie.owner_layer for tie in ties for layer in tie.borrower_layers}


def update(state: State, gradient: int, work: int, verdict: int) -> State:
    return mix(41, state[0], gradient, verdict), work


class Reference:
    """The undisturbed history, for any rollbacks."""

    def __init__(
        self, layers: int, microbatches: int, rollbacks: Rollbacks, ties: tuple[Tie, ...] = ()
    ) -> None:
        self.layers, self.microbatches, self.rollbacks = layers, microbatches, rollbacks
        self.owners = owners_of(ties)
        self.known: dict[tuple[int, ...], tuple[State, ...]] = {
            (): tuple(initial(layer) for layer in range(layers))
        }
        self.verdicts: dict[tuple[int, ...], int] = {}

    def generations(self, version: int, epoch: int) -> tuple[int, ...]:
        return tuple(self.rollbacks.generation(step, epoch) for step in range(version))

    def state(self, version: int, epoch: int) -> tuple[State, ...]:
        """All layers at `version`, as made by a run of `epoch`."""
        key = self.generations(version, epoch)
        for length in range(1, len(key) + 1):
            if key[:length] not in self.known:
                self._step(key[:length])
        return self.known[key]

    def _step(self, key: tuple[int, ...]) -> None:
        step, states = len(key) - 1, self.known[key[:-1]]
        work = [state[1] for state in states]
        gradients = [0] * self.layers
        used = [
            borrow(state, states[self.owners[layer]][0]) if layer in self.owners else state
            for layer, state in enumerate(states)
        ]
        for microbatch in range(self.microbatches):
            x = rows(step, microbatch, key[-1])
            seen = []
            for layer, state in enumerate(used):
                seen.append(x)
                work[layer] = statistics(work[layer], x)
                x = forward(state, x)
            dy = loss_gradient(x, step, microbatch)
            for layer in reversed(range(self.layers)):
                gradient, dy = backward(used[layer], seen[layer], dy)
                gradients[layer] = mix(43, gradients[layer], gradient)
        verdict = verdict_of({layer: mix(47, g) for layer, g in enumerate(gradients)})
        self.verdicts[key] = verdict
        raw = list(gradients)
        for owner in set(self.owners.values()):
            partials = {b: raw[b] for b, lender in self.owners.items() if lender == owner}
            gradients[owner] = merge(raw[owner], partials)
        self.known[key] = tuple(
            update(state, gradients[layer], work[layer], verdict)
            for layer, state in enumerate(states)
        )
