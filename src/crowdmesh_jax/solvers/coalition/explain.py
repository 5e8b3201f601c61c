"""A coalition structure in words and numbers. Decides nothing."""

from __future__ import annotations

from ..units import format_seconds
from .problem import CoalitionResult

_NAMED = 4
"""Members that a line names."""
_SHOWN = 40
"""Coalitions that have a line; where there are more, the slowest."""


def explain(result: CoalitionResult) -> str:
    """Headline, a line per coalition (the slowest first), the certificate, notes."""
    size, devices = len(result.structure), len(result.structure.devices)
    slowest, mean = format_seconds(result.slowest_round_s), format_seconds(result.mean_round_s)
    head = f"{size} coalitions of {devices} devices; a round takes {slowest}"
    lines = [f"{head}, the mean coalition {mean}"]
    rows = [("round", "step", "steps", "rows", "imbalance", "members")]
    ordered = sorted(result.values, key=lambda v: (-v.round_s, v.members))
    for value in ordered[:_SHOWN]:
        named = ", ".join(value.members[:_NAMED])
        if len(value.members) > _NAMED:
            named += f" and {len(value.members) - _NAMED} more"
        rows.append(
            (
                format_seconds(value.round_s),
                format_seconds(value.step_s),
                f"{value.steps:.0f}",
                f"{100 * value.share:.1f} %",
                f"{value.imbalance:.2f}",
                named + ("" if value.holds_model else " (cannot hold the model)"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if len(ordered) > _SHOWN:
        quicker = ordered[_SHOWN:]
        times = format_seconds(quicker[0].round_s), format_seconds(quicker[-1].round_s)
        lines.append(f"and {len(quicker)} coalitions with rounds of {times[0]} down to {times[1]}")
    lines.append(result.certificate.line())
    lines.append(
        f"solver: {result.solver}, {format_seconds(result.solve_s)}; {result.rounds} passes,"
        f" {result.switches} moves, {result.evaluations} coalitions rated"
    )
    return "\n".join([*lines, *result.notes])
