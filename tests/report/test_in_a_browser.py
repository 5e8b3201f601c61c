"""The pages in a real browser: no complaints, nothing from the network, nothing sticks out."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from report.run_folders import make_run
from support.browser import browser_page, find_browser

import crowdmesh_jax as cm

PICTURE = Path(__file__).parents[2] / "docs" / "report.png"
MOST_BYTES = 250_000

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium on the PATH"),
]

STICKS_OUT = """(() => {
  const out = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) out.push("the page is wider than the window");
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest(".scroll, defs, clipPath, .hover, .marks, #summary h2, title")) continue;
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1))
      out.push(`${element.tagName} ${element.textContent.slice(0, 30)}: ${box.left}..${box.right}`);
  }
  return out;
})()"""

OVERLAPS = """(() => {
  const out = [];
  for (const svg of document.querySelectorAll("svg.chart")) {
    const texts = [...svg.querySelectorAll("text")].map((t) => [t, t.getBoundingClientRect()])
      .filter(([, box]) => box.width);
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
      const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      const where = svg.getAttribute("aria-label");
      if (x > 1 && y > 3) out.push(`${where}: ${a.textContent} | ${b.textContent}`);
    }));
  }
  return out;
})()"""

SHOWN = """[...document.querySelectorAll("section")]
  .filter((s) => s.getBoundingClientRect().height > 30).map((s) => s.id)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser_page(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind: a run with everything, a killed one, a halted one, a comparison."""
    root = tmp_path_factory.mktemp("runs")
    whole = make_run(root, "whole", evaluate_every=3, has_memory=True)
    killed = make_run(root, "killed-" + "long-name-" * 8, end=None, has_trace=False)
    halted = make_run(root, "halted", end="halt", steps=5)
    return {
        "whole": cm.report(whole.path).html,
        "killed": cm.report(killed.path).html,
        "halted": cm.report(halted.path).html,
        "both": cm.report(whole.path, halted.path).html,
    }


def test_the_checks_below_see_what_they_are_for(page, pages):
    page.open(pages["whole"].as_uri(), width=420)
    page.complaints.clear()
    page.run(
        "document.querySelector('main').insertAdjacentHTML('beforeend',"
        " '<p style=\"width: 500px\">wide</p>');"
        "const text = document.querySelector('svg.narrow text');"
        "text.parentNode.append(text.cloneNode(true)); console.error('oh'); 0"
    )
    assert any("wide" in line for line in page.run(STICKS_OUT))
    assert len(page.run(OVERLAPS)) == 1
    assert any("oh" in line for line in page.complaints)


@pytest.mark.parametrize("width", [1200, 420])
@pytest.mark.parametrize("kind", ["whole", "killed", "halted", "both"])
def test_nothing_sticks_out_or_overlaps_and_nobody_complains(page, pages, kind, width):
    page.complaints.clear()
    page.requests.clear()
    address = pages[kind].as_uri()
    page.open(address, width=width, dark=width == 420)
    assert page.run(STICKS_OUT) == []
    assert page.run(OVERLAPS) == []
    shown = page.run(SHOWN)
    assert {"summary", "loss", "step-time", "plan"} <= set(shown)
    if kind in ("whole", "halted"):
        assert shown == [
            "summary", "loss", "step-time", "gantt", "shares", "links", "memory", "plan", "events",
            "words",
        ]  # fmt: skip
    assert page.complaints == []
    assert set(page.requests) == {address}
    is_narrow = page.run("getComputedStyle(document.querySelector('.chart.wide')).display")
    assert is_narrow == ("none" if width == 420 else "block")


def test_letters_stand_out_from_the_paper_in_light_and_dark(page, pages):
    def contrast(selector):
        script = (
            "(() => { const part = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)"
            ".map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));"
            "const light = (c) => { const [r, g, b] = part(c);"
            " return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
            f"const e = document.querySelector('{selector}'), s = getComputedStyle(e);"
            "const a = light(e.ownerSVGElement ? s.fill : s.color);"
            "const b = light(getComputedStyle(document.body).backgroundColor);"
            "return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })()"
        )
        return page.run(script)

    for dark in (False, True):
        page.open(pages["whole"].as_uri(), width=1200, dark=dark)
        # WCAG 2.1, 1.4.3: at least 4.5 for text
        for selector in ("h1", ".lead", ".tile span", ".chart text", ".chart text.quiet", "a"):
            assert contrast(selector) >= 4.5, (selector, dark)


def test_pointing_tells_a_bar_and_dragging_zooms(page, pages):
    page.open(pages["whole"].as_uri(), width=1200)
    page.run("document.querySelector('#gantt svg.wide').scrollIntoView({block: 'center'})")
    box = "document.querySelectorAll('#gantt svg.wide .marks rect')[0].getBoundingClientRect()"
    x, y = page.run(f"(({box}).left + ({box}).right) / 2"), page.run(f"({box}).top + 5")
    page.move(x, y)
    assert page.run("document.getElementById('tip').textContent").startswith("fast: forward of 0")
    assert page.run("getComputedStyle(document.getElementById('tip')).display") == "block"

    width = page.run(f"({box}).width")
    page.move(x - 3, y, "mousePressed", 1)
    page.move(x + 150, y, "mouseMoved", 1)
    page.move(x + 150, y, "mouseReleased")
    assert page.run(f"({box}).width") > 3 * width
    page.run("document.querySelector('#gantt svg.wide .zoom').dispatchEvent(new Event('dblclick'))")
    assert page.run(f"({box}).width") == pytest.approx(width)

    page.run("document.querySelector('#loss svg.wide').scrollIntoView({block: 'center'})")
    area = "document.querySelector('#loss svg.wide .catch').getBoundingClientRect()"
    page.move(page.run(f"({area}).right - 2"), page.run(f"({area}).top + 20"))
    told = page.run("document.getElementById('tip').textContent").split("\n")
    assert told[:2] == ["step 11", "training 0.1667"]


@pytest.mark.long
def test_the_picture_in_the_documentation_is_of_a_real_run(page, tmp_path):
    image = pytest.importorskip("PIL.Image")
    subprocess.run(
        [sys.executable, "-m", "crowdmesh_jax.cli", "demo", "--steps", "120", "--name", "demo",
         "--checkpoint-every", "50"],
        cwd=tmp_path, check=True, timeout=600, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    made = cm.report(tmp_path / "runs" / "demo")
    assert made.runs[0].state == "finished"
    page.complaints.clear()
    page.open(made.html.as_uri(), width=1000)
    assert page.run(STICKS_OUT) == []
    assert page.complaints == []
    # What a reader of the README wants first: the outcome, the curve, the step, its shares.
    page.run(
        "for (const id of ['step-time', 'links', 'memory', 'plan', 'events', 'words'])"
        " document.getElementById(id).remove();"
        "document.querySelector('#loss h3').remove();"
        "document.querySelectorAll('#loss figure')[1].remove();"
        "document.querySelector('footer').remove(); document.querySelector('nav').remove(); 0"
    )
    shot = tmp_path / "shot.png"
    page.screenshot(shot)
    small = io.BytesIO()
    image.open(shot).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    assert 20_000 < len(small.getvalue()) < MOST_BYTES
    PICTURE.write_bytes(small.getvalue())
