// Line charts of a few series over time, as SVG.

const SPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [340, 150, 4, 22, 10];

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return a round number of at least `value`: 1, 2 or 5 times a power of ten. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.999) * power;
}

/**
 * Return the chart of {name, kind, points: [[seconds ago, value or null], …]}, newest last.
 * `format(value)` writes a value with its unit; `title` says what is drawn.
 */
export function lineChart(title, series, format, span) {
  const values = series.flatMap(({ points }) => points.map(([, value]) => value)).filter((value) => value !== null);
  const top = roundUp(Math.max(...values, 0));
  const x = (ago) => WIDTH - LEFT - (ago / span) * (WIDTH - 2 * LEFT);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - TOP);
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": describe(title, series, format) });
  for (const share of [0, 0.5, 1]) {
    chart.append(svg("line", { x1: LEFT, x2: WIDTH - LEFT, y1: y(share * top), y2: y(share * top), class: "grid" }));
  }
  chart.append(text(LEFT, y(top) + 12, format(top)), text(LEFT, HEIGHT - 6, `${span / 60} min ago`), text(WIDTH - LEFT, HEIGHT - 6, "now", "end"));
  for (const { kind, points } of series) {
    for (const run of runs(points)) chart.append(svg("path", { d: run.map(([ago, value], index) => `${index ? "L" : "M"}${x(ago).toFixed(1)} ${y(value).toFixed(1)}`).join(""), class: `line ${kind}` }));
    const last = points.at(-1);
    if (last && last[1] !== null) chart.append(svg("circle", { cx: x(last[0]), cy: y(last[1]), r: 3, class: `dot ${kind}` }));
  }
  return chart;
}

function text(x, y, content, anchor = "start") {
  const element = svg("text", { x, y, "text-anchor": anchor });
  element.textContent = content;
  return element;
}

function describe(title, series, format) {
  const now = series.map(({ name, points }) => `${name} ${points.at(-1)?.[1] == null ? "none" : format(points.at(-1)[1])}`);
  return `${title}. Now: ${now.join(", ") || "none"}`;
}

/** Yield the parts of a line that have values. */
function* runs(points) {
  let run = [];
  for (const point of [...points, [0, null]]) {
    if (point[1] !== null) run.push(point);
    else if (run.length) {
      yield run;
      run = [];
    }
  }
}
