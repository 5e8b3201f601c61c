"""Puts operations that only one branch of a `cond` needs back into that branch, and runs them.

A `cond` over the whole tree was written out so that each of its outputs has an owner of its own.
Run like that, both branches would be paid for at each step, and the compiler could fuse across
what was a boundary before, which changes last bits. Knows operations and regions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from .optimizer_graph import Graph, Operation, Value


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """What one branch of a choice computes beyond values that exist already."""

    steps: tuple[Step, ...]
    results: tuple[Value, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Runs the branch that `index` names."""

    index: Value
    branches: tuple[Branch, ...]
    outputs: tuple[Value, ...]


Step = Operation | Choice


def as_function(
    graph: Graph,
    operations: Sequence[Operation],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
) -> Callable[..., tuple[Any, ...]]:
    """A traceable function of `inputs` that carries out `operations` and returns `outputs`."""
    steps = arrange(operations, outputs, frozenset(inputs))
    read = {v for op in operations for v in op.inputs} | set(outputs)
    constants = {v: c for v, c in graph.constants.items() if v in read}

    def run(*arrays: Any) -> tuple[Any, ...]:
        env = {**constants, **dict(zip(inputs, arrays, strict=True))}
        return _run(steps, env, outputs)

    return run


def arrange(
    operations: Sequence[Operation], targets: Sequence[Value], given: frozenset[Value]
) -> tuple[Step, ...]:
    """Steps that make `targets`, with branches nested where possible.

    An operation of a branch stays outside where its result is read outside that branch: a norm
    that is sent away, say. Inside, such values are captured.
    """
    wanted = set(targets) - given
    pending: dict[int, _Pending] = {}
    steps: list[Step | _Pending] = []
    for op in reversed(operations):
        made = set(op.outputs)
        if wanted.isdisjoint(made):
            inner = [
                (group, i)
                for group in pending.values()
                for i, needs in enumerate(group.needs)
                if not needs.isdisjoint(made)
            ]
            if len(inner) == 1 and (inner[0][0].number, inner[0][1]) in op.region:
                group, i = inner[0]
                group.operations[i].append(op)
                group.needs[i].update(v for v in op.inputs if v not in given)
                continue
            if not inner:
                continue
        if op.choice is None:
            steps.append(op)
            wanted.update(v for v in op.inputs if v not in given)
            continue
        index, *cases = op.inputs
        wanted.update({index} - given)
        if op.choice not in pending:
            pending[op.choice] = _Pending.empty(op.choice, index, len(cases))
            steps.append(pending[op.choice])
        pending[op.choice].add(op.outputs[0], cases, given)
    return tuple(s.close(given) if isinstance(s, _Pending) else s for s in reversed(steps))


@dataclass(slots=True, eq=False)
class _Pending:
    """A choice whose picks and branches are being collected, last operation first."""

    number: int
    index: Value
    outputs: list[Value]
    results: list[list[Value]]
    needs: list[set[Value]]
    operations: list[list[Operation]]

    @classmethod
    def empty(cls, number: int, index: Value, branches: int) -> _Pending:
        each = range(branches)
        return cls(number, index, [], [[] for _ in each], [set() for _ in each], [[] for _ in each])

    def add(self, output: Value, cases: Sequence[Value], given: frozenset[Value]) -> None:
        self.outputs.append(output)
        for i, case in enumerate(cases):
            self.results[i].append(case)
            self.needs[i].update({case} - given)

    def close(self, given: frozenset[Value]) -> Choice:
        branches = []
        for results, inside in zip(self.results, self.operations, strict=True):
            own = {v for op in inside for v in op.outputs}
            captured = {v for op in inside for v in op.inputs} - own
            known = given | captured | (set(results) - own)
            branches.append(Branch(arrange(inside[::-1], results, known), tuple(results)))
        return Choice(self.index, tuple(branches), tuple(self.outputs))


def _run(steps: Sequence[Step], env: dict[Value, Any], outputs: Sequence[Value]) -> tuple[Any, ...]:
    for step in steps:
        if isinstance(step, Choice):
            made = _run_choice(step, env)
        else:
            made = step.run(*(env[v] for v in step.inputs))
        for value, array in zip(step.outputs, made, strict=True):
            env.setdefault(value, array)  # a value that was passed in stays as it came
    return tuple(jax.numpy.asarray(env[v]) for v in outputs)


def _run_choice(choice: Choice, env: dict[Value, Any]) -> Sequence[Any]:
    def branch(one: Branch) -> Callable[[], tuple[Any, ...]]:
        return lambda: _run(one.steps, dict(env), one.results)

    index = env[choice.index]
    functions = [branch(one) for one in choice.branches]
    if len(functions) == 2:
        return jax.lax.cond(index != 0, functions[1], functions[0])
    return jax.lax.switch(index, functions)
