"""The page of a run: which sections, which words. What values mean is said elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..core import Crowd, Device, PipelinePlan
from . import units
from .figures import (
    StepFigures,
    gantt_chart,
    loss_chart,
    memory_chart,
    memory_terms,
    metric_charts,
    shares_chart,
    stage_layers,
    step_time_chart,
)
from .html import document, figure, table, tiles
from .reading import RunView, Status
from .recovered import recovery_chart, recovery_gantts
from .story import Entry, tell

STATES = {
    "finished": ("finished", "good"),
    "halted": ("stopped", "bad"),
    "running": ("still running", "info"),
    "killed": ("killed", "bad"),
}
MANY_ENTRIES = 60


# One run -----------------------------------------------------------------------------------------


def run_page(view: RunView, figures: StepFigures) -> str:
    """The report of one run."""
    top = (
        f'<p class="eyebrow">crowdmesh run report</p><h1>{escape(view.name)}'
        f'{badge(view.status)}</h1><p class="lead">{escape(describe(view))}</p>'
        f"{notices(view)}"
    )
    shares = (
        ("", figures.measured_shares, False),
        ("predicted", figures.predicted_shares, True),
    )
    sections = (
        ("summary", "Summary", tiles(key_figures(view))),
        ("loss", "Loss and metrics", _curves(view)),
        ("step-time", "Step time", _step_time(view)),
        ("recovery", "Recovery", _recovery(view)),
        ("gantt", "One step", _gantt(view, figures)),
        ("shares", "Where the time goes", _shares(figures, figure(shares_chart(shares)))),
        ("links", "Links", _links(view, figures)),
        ("memory", "Memory", _memory(view)),
        ("plan", "Plan", plan_html(view)),
        ("events", "Events", story(tell(view.records))),
        ("words", "Terms", WORDS),
    )
    return document(f"{view.name}: crowdmesh run report", top, sections)


def badge(status: Status) -> str:
    words, tone = STATES[status.state]
    return f'<span class="badge {tone}">{words}</span>'


def describe(view: RunView) -> str:
    """One sentence: job, crowd, outcome."""
    job, run = view.config.get("job", {}), view.config.get("run", {})
    parts = []
    if job:
        parts.append(
            f"{job.get('model', 'a model')}, {len(job.get('layers', ()))} layers, batches of"
            f" {job.get('batch_size', '?')} in {job.get('microbatches', '?')} microbatches"
        )
    if view.plan:
        over = f"over {len(view.plan.stages)} devices"
        if view.crowd and len(view.crowd.devices) > len(view.plan.stages):
            over += f" of {len(view.crowd.devices)}"
        parts.append(f"{over} ({view.plan.schedule}, {run.get('transport', '?')})")
    of = f" of {view.steps_planned}" if view.steps_planned else ""
    parts.append(f"{view.committed}{of} steps")
    begin_s = next((r["at_s"] for r in view.records if isinstance(r.get("at_s"), float)), None)
    if begin_s is not None:
        parts.append(f"begun {units.moment(begin_s)}")
    return "; ".join(parts) + "."


def notices(view: RunView) -> str:
    """What the reader must know before the figures: an unusual end, and what cannot be read."""
    status, out = view.status, ""
    when = units.moment(status.at_s)
    if status.state == "running":
        out += (
            '<div class="notice info"><p><strong>Still running.</strong> This page shows what'
            f" stood in the folder; the last record is of {when} ({escape(status.text)}).</p></div>"
        )
    elif status.state == "killed":
        out += (
            f'<div class="notice bad"><p><strong>Killed at {when}, or shortly after.</strong>'
            f" The run has no end: {escape(status.text)}. A run that is copied from another machine"
            " while it goes on looks the same. Op times are written when a run ends, so there are"
            " none here.</p></div>"
        )
    elif status.state == "halted":
        code = f"{status.code} " if status.code else ""
        out += (
            f'<div class="notice bad"><p><strong>Stopped: {escape(code)}</strong></p>'
            f"<pre>{escape(status.text)}</pre></div>"
        )
    if view.problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in view.problems)
        out += f'<div class="notice"><p>Parts of this run cannot be read:</p><ul>{items}</ul></div>'
    return out


def key_figures(view: RunView) -> list[tuple[str, str, str]]:
    """(what, figure, remark)."""
    measured, predicted = view.measured_step_s, view.predicted_step_s
    found = [
        ("measured step", units.seconds(measured), "median"),
        (
            "predicted step",
            units.seconds(predicted),
            f"measured is {units.change(measured, predicted)}"
            if measured and predicted
            else "not predicted in this run",
        ),
    ]
    batch = view.config.get("job", {}).get("batch_size")
    if measured and isinstance(batch, int):
        found.append(("throughput", f"{units.figures(batch / measured)} /s", "samples"))
    if view.rows:
        first, last = view.rows[0], view.rows[-1]
        found.append(("loss", units.plain(last.loss), f"from {units.plain(first.loss)}"))
        for name, value in list(last.metrics.items())[:2]:
            found.append((name, units.plain(value), f"training, step {last.step}"))
    if view.evals:
        last_eval = view.evals[-1]
        for name, value in list(last_eval.values.items())[:2]:
            found.append(
                (f"evaluation {name}", units.plain(value), f"version {last_eval.step + 1}")
            )
    of = f"of {view.steps_planned}" if view.steps_planned else ""
    found.append(("steps", str(view.committed), of))
    if view.recoveries:
        lost = [device for event in view.recoveries for device in event.lost]
        longest_s = max(event.total_s for event in view.recoveries)
        found.append(("recoveries", str(len(view.recoveries)), f"{len(lost)} devices lost"))
        found.append(("longest recovery", units.seconds(longest_s), "last word to next step"))
    times = [r["at_s"] for r in view.records if isinstance(r.get("at_s"), float)]
    if len(times) > 1:
        found.append(("duration", units.seconds(times[-1] - times[0]), "first to last record"))
    return found


def _curves(view: RunView) -> str:
    loss = loss_chart([view])
    if loss is None:
        return "<p>No step was committed yet.</p>"
    lead = "" if view.evals else " This run was not evaluated while it trained."
    charts = "".join(f"<h3>{escape(c.title)}</h3>{figure(c)}" for c in metric_charts([view]))
    return f'<p class="lead">One value per committed step.{lead}</p>{figure(loss)}{charts}'


def _step_time(view: RunView) -> str:
    chart = step_time_chart([view])
    if chart is None:
        return ""
    planned = view.prediction.planned_step_s if view.prediction else None
    text = "From commit to commit."
    if view.predicted_step_s is not None:
        text += (
            " The prediction comes from stage times that each device measured alone before the"
            f" first step: {units.seconds(view.predicted_step_s)}; the measured median is"
            f" {units.seconds(view.measured_step_s)}"
            f" ({units.change(view.measured_step_s, view.predicted_step_s)})."
        )
    if planned is not None:
        text += f" The solver, from its profile, thought of {units.seconds(planned)}."
    if view.recoveries:
        text += (
            " The median is of the steps before the first recovery; the highest points are those"
        )
        text += " that a recovery lengthened."
    return f'<p class="lead">{text}</p>{figure(chart)}'


def _recovery(view: RunView) -> str:
    if not view.recoveries:
        return ""
    begin_s = next((r["at_s"] for r in view.records if isinstance(r.get("at_s"), float)), None)
    rows, told = [], []
    for event in view.recoveries:
        since_s = None if begin_s is None else event.at_s - begin_s
        at = "" if since_s is None else f"+{units.clock(since_s)}"
        chain = " \N{RIGHTWARDS ARROW} ".join(event.devices)
        text = f"{event.story()}. From here on: {chain}"
        told.append(f'<li class="bad"><time>{at}</time><i></i><div>{escape(text)}</div></li>')
        seconds = (
            event.total_s, event.silent_s, event.fenced_s, event.planned_s, event.installed_s,
            event.compiled_s, event.first_step_s,
        )  # fmt: skip
        rows.append(
            (
                escape(", ".join(event.lost) or "nobody"),
                *(units.seconds(value_s) for value_s in seconds),
                units.size(event.moved_bytes),
                str(event.replayed_steps),
                str(event.redone_steps),
            )
        )
    columns = (
        "lost", "in all", "noticed", "stopped", "decided", "ready again", "of it compiling",
        "first step", "moved", "steps replayed", "redone by all",
    )  # fmt: skip
    lead = (
        "From the last word of the lost device to the next committed step. Replayed steps were run"
        " a second time by who took over, alone; steps redone were run again by everyone."
    )
    gantts = "".join(f"<h3>{escape(c.title)}</h3>{figure(c)}" for c in recovery_gantts(view))
    return (
        f'<p class="lead">{lead}</p><ol class="story">{"".join(told)}</ol>'
        f"{figure(recovery_chart(view))}{table(columns, rows)}{gantts}"
    )


def _gantt(view: RunView, figures: StepFigures) -> str:
    chart = gantt_chart(view, figures)
    if chart is None or figures.window is None:
        why = "it is written when a run ends" if not view.events else "it holds no whole step"
        return f"<p>No op times: this folder has no trace of a whole step ({why}).</p>"
    what = (
        f"Step {figures.window.step}, of {figures.kept_steps} whole ones in the trace the one of"
        f" median length ({units.seconds(figures.window.length_s)}). Numbers are microbatches."
    )
    if view.recoveries:
        what += " Kept steps are those before the first recovery, where there are any."
    hint = (
        '<p class="hint">Point at a bar for its time; drag across to zoom, double-click to see all'
        " again.</p>"
    )
    return f'<p class="lead">{what}</p>{figure(chart)}{hint}'


def _shares(figures: StepFigures, chart: str) -> str:
    if not chart:
        return ""
    which = (
        f"Measured over {figures.kept_steps} steps."
        if figures.measured_shares
        else "Predicted; nothing was measured."
    )
    return f'<p class="lead">{which} The shares of a row add up to the whole step.</p>{chart}'


def _links(view: RunView, figures: StepFigures) -> str:
    rows = []
    predicted = _predicted_transfers(view)
    for use in figures.cuts:
        expected = predicted.get((use.source, use.target))
        rows.append(
            (
                f"{escape(use.source)} \N{RIGHTWARDS ARROW} {escape(use.target)}",
                units.seconds(use.transfer_s),
                units.seconds(expected),
                units.share(use.busy_share),
            )
        )
    if not rows:
        return ""
    lead = "Per microbatch, from the first byte sent to the last one received (medians)."
    columns = ("from, to", "measured", "predicted", "in use, of the step")
    return f'<p class="lead">{lead}</p>{table(columns, rows)}'


def _predicted_transfers(view: RunView) -> dict[tuple[str, str], float]:
    if view.plan is None or view.prediction is None:
        return {}
    devices, found = view.plan.devices, {}
    for index, cut in enumerate(view.prediction.cuts[: len(devices) - 1]):
        found[devices[index], devices[index + 1]] = cut.forward_s
        found[devices[index + 1], devices[index]] = cut.backward_s
    return found


def _memory(view: RunView) -> str:
    chart = memory_chart(view)
    planned = view.prediction.memory if view.prediction else {}
    if chart is None or view.plan is None:
        return "<p>Memory was neither predicted nor measured in this run.</p>"
    if view.memory:
        lead = (
            "Peak of each agent's process above what it held idle, beside a prediction from its"
            " programs' own arrays and the compiler's figures. Both count what an agent holds as"
            " soon as it runs anything; the planned figure does not. Copies of other stages, and"
            " programs that were compiled ahead, are in the measured figure alone."
        )
    else:
        lead = "Predicted by the planner, term by term. Memory was not measured in this run."
    rows = []
    for device in dict.fromkeys((*view.plan.devices, *view.memory)):
        known, measured = _device(view.crowd, device), view.memory.get(device)
        plan = planned.get(device)
        terms = memory_terms(plan) if plan else ()
        rows.append(
            (
                escape(device),
                units.size(measured.measured_bytes if measured else None),
                units.size(measured.predicted_bytes if measured else None),
                units.size(plan.training_bytes if plan else None),
                units.size(known.memory_bytes if known else None),
                escape(", ".join(f"{words} {units.size(part)}" for words, part in terms)),
            )
        )
    columns = (
        "device", "measured", "predicted", "planned", "device has", "terms of the plan",
    )  # fmt: skip
    return f'<p class="lead">{lead}</p>{figure(chart)}{table(columns, rows, left=(0, 5))}'


def _device(crowd: Crowd | None, device: str) -> Device | None:
    return next((d for d in crowd.devices if d.id == device), None) if crowd else None


def plan_html(view: RunView) -> str:
    """Who runs which layers: a strip and a table."""
    plan = view.plan
    if plan is None:
        return "<p>This folder has no plan.</p>"
    layers = stage_layers(plan, view.layer_names)
    strip = "".join(
        f'<div class="back-{index % 6}" style="flex:{len(names)} 1 0;background:none">'
        f"<b>{escape(stage.device)}</b><span>{escape(_names(names))}</span></div>"
        for index, (stage, names) in enumerate(zip(plan.stages, layers, strict=True))
    )
    rows = []
    for index, stage in enumerate(plan.stages):
        times = view.programs_s.get(stage.device, {})
        device = _device(view.crowd, stage.device)
        rows.append(
            (
                f'<i class="dot back-{index % 6}"></i>{index}',
                escape(stage.device),
                f"{device.speed:.3g}" if device else units.MISSING,
                f"{stage.first_layer}\N{EN DASH}{stage.last_layer}"
                if stage.first_layer < stage.last_layer
                else str(stage.first_layer),
                units.seconds(times.get("forward")),
                units.seconds(times.get("loss_backward", times.get("backward"))),
                units.seconds(times.get("update")),
                "recomputed" if stage.recompute else "kept",
            )
        )
    columns = (
        "stage", "device", "speed", "layers", "forward", "backward", "update", "residuals",
    )  # fmt: skip
    spare = _spare(view.crowd, plan)
    left = f" Left out: {escape(', '.join(spare))}." if spare else ""
    return (
        f'<p class="lead">{escape(plan.schedule)}, {plan.microbatches} microbatches. Seconds are'
        f" per microbatch (update: per step), each stage measured alone.{left}</p>"
        f'<div class="strip">{strip}</div>{table(columns, rows, left=(0, 1))}'
    )


def _names(names: Sequence[str]) -> str:
    return (
        ", ".join(names) if len(names) <= 6 else f"{names[0]} \N{HORIZONTAL ELLIPSIS} {names[-1]}"
    )


def _spare(crowd: Crowd | None, plan: PipelinePlan) -> list[str]:
    return [d.id for d in crowd.devices if d.id not in plan.devices] if crowd else []


def story(entries: Sequence[Entry]) -> str:
    """The events, oldest first; the middle of a long list folded away."""
    if not entries:
        return "<p>The journal is empty.</p>"
    made = [_entry(entry) for entry in entries]
    if len(made) <= MANY_ENTRIES:
        return f'<ol class="story">{"".join(made)}</ol>'
    head, middle, tail = made[:20], made[20:-20], made[-20:]
    return (
        f'<ol class="story">{"".join(head)}</ol><details><summary>{len(middle)} more</summary>'
        f'<ol class="story">{"".join(middle)}</ol></details><ol class="story">{"".join(tail)}</ol>'
    )


def _entry(entry: Entry) -> str:
    at = "" if entry.at_s is None else f"+{units.clock(entry.at_s)}"
    text = f"<small>{escape(entry.text)}</small>" if entry.text else ""
    return (
        f'<li class="{entry.tone}"><time>{at}</time><i></i><div>{escape(entry.title)}{text}</div>'
        "</li>"
    )


WORDS = """<dl>
<dt>measured step</dt><dd>Median time from one commit to the next, the first two steps
left out.</dd>
<dt>predicted step</dt><dd>The exact timeline of the schedule, with the seconds of each stage's
programs and the hops between devices, all measured before the first step while nothing else
ran.</dd>
<dt>a step, in shares</dt><dd>From the first stage's first forward to the same moment of the next
step, for all devices alike. Each instant of a device belongs to one share.</dd>
<dt>compute</dt><dd>A forward or backward runs (on an emulated device: or is stretched to its
speed).</dd>
<dt>update</dt><dd>Another op runs: reduce, optimizer update, snapshot, book-keeping.</dd>
<dt>waiting for a link</dt><dd>No op runs, and the frame that the next op needs is on its way:
sent, and not yet received whole.</dd>
<dt>ready, not run</dt><dd>No op runs although all that the next one needs is there: the runtime's
own time, or a core that was busy with something else. Predictions know none.</dd>
<dt>bubble</dt><dd>No op runs, and nobody has sent yet what the next one needs: a frame, or the
commit.</dd>
<dt>void, done again</dt><dd>Work on a step that was not committed when a device was lost; everyone
runs that step anew.</dd>
<dt>in use</dt><dd>Share of the steps in which at least one frame was on its way over the link in
that direction.</dd>
<dt>memory</dt><dd>Measured: the peak of the agent's process less what it held idle. Predicted: its
programs' own arrays and the compiler's figures. Planned: the planner's formula, from the profile;
compiling, which comes before training, is in none of the predictions.</dd>
</dl>"""
