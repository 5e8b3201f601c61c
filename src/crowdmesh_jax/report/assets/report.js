"use strict";
// Pointing shows values, dragging over a step zooms into it. The page is whole without any of this.
document.documentElement.classList.add("scripted");
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { id: "tip" }));

function showTip(text, event) {
  tip.textContent = text;
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  const box = tip.getBoundingClientRect();
  const x = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 10 : event.clientX + 14;
  const y = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 8 : event.clientY + 18;
  tip.style.left = Math.max(4, x) + "px";
  tip.style.top = Math.max(4, y) + "px";
}

function place(svg, event) {
  const box = svg.getBoundingClientRect();
  return ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
}

for (const mark of document.querySelectorAll("svg.chart :is(rect, path) > title")) {
  const parent = mark.parentNode, text = mark.textContent;
  mark.remove();
  parent.addEventListener("pointermove", (event) => showTip(text, event));
  parent.addEventListener("pointerleave", (event) => showTip("", event));
}

for (const hover of document.querySelectorAll("svg.chart .hover")) {
  const svg = hover.ownerSVGElement, catcher = hover.nextElementSibling;
  const series = JSON.parse(hover.dataset.series), line = hover.querySelector("path");
  catcher.addEventListener("pointermove", (event) => {
    const x = place(svg, event);
    const near = series.map(([name, points]) => {
      let best = points[0];
      for (const point of points) if (Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
      return [name, best];
    });
    const first = near.reduce((a, b) => (Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a));
    line.setAttribute("transform", `translate(${first[1][0]} 0)`);
    hover.style.visibility = "visible";
    const told = near.filter(([, point]) => Math.abs(point[0] - first[1][0]) < 1);
    const lines = told.map(([name, point]) => `${name} ${point[2]}`);
    showTip([`${hover.dataset.x} ${first[1][1]}`, ...lines].join("\n"), event);
  });
  catcher.addEventListener("pointerleave", (event) => {
    hover.style.visibility = "hidden";
    showTip("", event);
  });
}

for (const zoom of document.querySelectorAll("svg.chart .zoom")) {
  const svg = zoom.ownerSVGElement, marks = zoom.querySelector(".marks");
  const texts = [...zoom.querySelectorAll(".labels text")];
  const left = +zoom.dataset.left, right = +zoom.dataset.right, max = +zoom.dataset.max;
  const bottom = +zoom.dataset.bottom, top = +zoom.dataset.top;
  const original = [...svg.querySelectorAll(".tick")];
  const made = svg.insertBefore(document.createElementNS(svg.namespaceURI, "g"), zoom);
  const select = zoom.appendChild(document.createElementNS(svg.namespaceURI, "rect"));
  select.setAttribute("class", "band-select");
  for (const text of texts) text.dataset.x = text.getAttribute("x");
  let low = 0, high = max, from = null;

  const draw = () => {
    const scale = max / (high - low), shift = left - (left + ((right - left) * low) / max) * scale;
    marks.setAttribute("transform", `translate(${shift} 0) scale(${scale} 1)`);
    for (const text of texts) text.setAttribute("x", text.dataset.x * scale + shift);
    for (const tick of original) tick.style.display = scale === 1 ? "" : "none";
    made.replaceChildren();
    if (scale === 1) return;
    const raw = (high - low) / 6, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
    for (let t = Math.ceil(low / step) * step; t <= high; t += step) {
      const x = left + ((t - low) / (high - low)) * (right - left);
      const path = document.createElementNS(svg.namespaceURI, "path");
      path.setAttribute("class", "grid");
      path.setAttribute("d", `M${x} ${top}V${bottom}`);
      const text = document.createElementNS(svg.namespaceURI, "text");
      text.setAttribute("class", "middle quiet");
      text.setAttribute("x", x);
      text.setAttribute("y", bottom + 15);
      text.textContent = +t.toPrecision(6);
      made.append(path, text);
    }
  };
  const mark = (x) => {
    const at = Math.min(Math.max(x, left), right);
    select.setAttribute("x", Math.min(from, at));
    select.setAttribute("width", Math.abs(at - from));
    select.setAttribute("y", top);
    select.setAttribute("height", bottom - top);
    return at;
  };
  zoom.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch") return; // a finger scrolls the page
    from = Math.min(Math.max(place(svg, event), left), right);
    event.preventDefault();
  });
  addEventListener("pointermove", (event) => { if (from !== null) mark(place(svg, event)); });
  addEventListener("pointerup", (event) => {
    if (from === null) return;
    const to = mark(place(svg, event)), value = (x) => low + ((x - left) / (right - left)) * (high - low);
    const [a, b] = [value(Math.min(from, to)), value(Math.max(from, to))];
    if (Math.abs(to - from) > 8) { low = a; high = b; draw(); }
    from = null;
    select.setAttribute("width", 0);
  });
  zoom.addEventListener("dblclick", () => { low = 0; high = max; draw(); });
}
