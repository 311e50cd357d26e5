// The operations view. Everything comes from /health, /models and /metrics; the page keeps the last readings.

import { $, h, percent, show } from "./dom.js";
import { Problem, apiKey, call } from "./api.js";
import { lineChart } from "./chart.js";
import { connectKey } from "./key.js";
import { growth, parse, quantile, select, total, totals } from "./metrics.js";

const EVERY_MS = 2000;
const SPAN_S = 300;
const WINDOW_S = 20;
const KINDS = { stable: "stable", canary: "canary" };
// Outcomes that are the version's fault, as `gradserve promote --auto` counts them; a caller's broken image is none.
const FAULTS = ["handler_failed", "engine_broke", "engine_nonsense", "deadline_passed", "not_ready", "internal_error"];
const PLACES = { predict: "Predictions in flight", explain: "Explanations in flight", backward: "Explanations with a backward pass" };
const STATES = { ok: "All is well", degraded: "It serves, with less than it should", unavailable: "It does not serve" };

const readings = []; // {at: seconds, samples}, oldest first

const seconds = (value) => (value === null ? "–" : value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`);
const rate = (value) => (value === null ? "–" : `${value.toFixed(value < 10 ? 1 : 0)}/s`);
const share = (value) => (value === null ? "–" : percent(value, value < 0.1 ? 2 : 1));
const PANELS = [
  ["Answers per second", "requests", rate],
  ["Median time in the model", "median", seconds],
  ["99th percentile of that time", "slowest", seconds],
  ["Failed answers", "failed", share],
  ["Mean confidence", "confidence", share],
];

async function update() {
  const health = (await call("health", { also: [503] })).data;
  showHealth(health);
  const [models, text] = await Promise.all([call("models"), call("metrics", { as: "text" })]);
  const at = Date.now() / 1000;
  readings.push({ at, samples: parse(text.data) });
  while (at - readings[0].at > SPAN_S + WINDOW_S) readings.shift();
  show($("message"), false);
  show($("data"));
  const { versions } = models.data;
  showVersions(versions, readings.at(-1).samples);
  showCharts(versions, at);
  showTrial(versions);
  showPlaces(readings.at(-1).samples);
  showRefused();
}

function showHealth({ status, model, plan_revision: revision, replicas, reasons }) {
  $("state").textContent = `${STATES[status]}.`;
  $("state-text").textContent = `${model ?? "No model"} · plan revision ${revision ?? "none"} · ${replicas.seen} of ${replicas.known} replicas give a status`;
  $("reasons").replaceChildren(...reasons.map((reason) => h("li", { textContent: reason })));
}

function showVersions(versions, samples) {
  const workers = ({ ready, wanted, fallback }) => `${ready} of ${wanted}${fallback ? `, ${fallback} on the fallback engine` : ""}`;
  $("versions").replaceChildren(...versions.map((version) => {
    const { contract } = version;
    const wanted = { model: version.model, version: version.version };
    const accuracy = contract.accepted?.figures?.held_out?.accuracy ?? contract.accepted?.figures?.validation_accuracy;
    const depth = total(samples, "gateway_queue_depth", wanted);
    const room = total(samples, "gateway_queue_capacity", wanted);
    return h(
      "tr",
      {},
      h("th", { scope: "row", textContent: `${version.model} ${version.version}` }),
      h("td", {}, h("span", { className: `role ${version.role}`, textContent: version.role })),
      h("td", { textContent: version.share ? percent(version.share / 100, Number.isInteger(version.share) ? 0 : 1) : "–" }),
      h("td", { textContent: version.routable || version.state !== "ready" ? version.state : `${version.state}, not verified` }),
      h("td", { textContent: workers(version.workers.predict) }),
      h("td", { textContent: workers(version.workers.explain) }),
      h("td", { textContent: room ? `${depth} of ${room}` : String(depth) }),
      h("td", { textContent: contract.engine ? `${contract.engine.name} ${contract.engine.precision}` : "–" }),
      h("td", { textContent: typeof accuracy === "number" ? percent(accuracy, 1) : "–" }),
    );
  }));
}

/** Return the figures of one version between two readings. */
function figures(a, b, { model, version }) {
  const wanted = { model, version };
  const span = b.at - a.at;
  const ended = (outcome) => growth(a.samples, b.samples, "gateway_version_requests_total", { ...wanted, outcome });
  const failed = FAULTS.reduce((sum, fault) => sum + ended(fault), 0);
  const answers = ended("ok") + failed;
  const count = growth(a.samples, b.samples, "gateway_confidence_count", wanted);
  return {
    requests: span > 0 ? answers / span : null,
    answers,
    failed: answers ? failed / answers : null,
    median: quantile(a.samples, b.samples, "gateway_model_seconds", 0.5, wanted),
    slowest: quantile(a.samples, b.samples, "gateway_model_seconds", 0.99, wanted),
    confidence: count ? growth(a.samples, b.samples, "gateway_confidence_sum", wanted) / count : null,
  };
}

/** Return the oldest reading within `span` seconds before `at`. */
const since = (at, span) => readings.find((reading) => at - reading.at <= span + 0.5);

function showCharts(versions, now) {
  const shown = versions.filter(({ role }) => role in KINDS);
  $("legend").replaceChildren(...shown.map(({ model, version, role }) => h("span", { className: `key ${KINDS[role]}`, textContent: `${model} ${version} (${role})` })));
  const lines = shown.map(({ model, version, role }) => ({
    name: `${model} ${version}`,
    kind: KINDS[role],
    figures: readings.slice(1).map((reading) => [now - reading.at, figures(since(reading.at, WINDOW_S), reading, { model, version })]),
  }));
  $("charts").replaceChildren(...PANELS.map(([title, name, format]) => {
    const series = lines.map((line) => ({ ...line, points: line.figures.map(([ago, found]) => [ago, found[name]]) }));
    const last = series.map(({ kind, points }) => h("span", { className: `now ${kind}`, textContent: points.length ? format(points.at(-1)[1]) : "–" }));
    return h("figure", { className: "chart" }, h("figcaption", {}, h("span", { textContent: title }), ...last), lineChart(title, series, format, SPAN_S));
  }));
}

function showTrial(versions) {
  const canary = versions.find(({ role }) => role === "canary");
  const stable = versions.find(({ model, role }) => role === "stable" && model === canary?.model);
  show($("trial"), Boolean(stable && canary && readings.length > 1));
  if ($("trial").hidden) return;
  const [first, last] = [readings[0], readings.at(-1)];
  const a = figures(first, last, stable);
  const b = figures(first, last, canary);
  const all = a.answers + b.answers;
  const rows = [
    ["Answers", String(a.answers), String(b.answers)],
    ["Share of the answers", share(all ? a.answers / all : null), share(all ? b.answers / all : null)],
    ...PANELS.slice(1).map(([title, name, format]) => [title, format(a[name]), format(b[name])]),
  ];
  const cells = (tag, values) => h("tr", {}, ...values.map((value, index) => h(index && tag === "th" ? "th" : index ? "td" : "th", { scope: index ? "col" : "row", textContent: value })));
  const head = cells("th", [`The last ${Math.round((last.at - first.at) / 60) || "<1"} min`, `${stable.version} (stable)`, `${canary.version} (canary)`]);
  $("trial-head").replaceChildren(head);
  $("trial-body").replaceChildren(...rows.map((row) => cells("td", row)));
}

function meter(name, text, value, is = "") {
  const filled = h("span", { className: "fill" });
  filled.style.width = `${100 * Math.min(1, Math.max(0, value))}%`;
  return h("li", {}, h("span", { className: "name", textContent: name }), h("span", { className: `track ${is}` }, filled), h("span", { className: "value", textContent: text }));
}

function showPlaces(samples) {
  const present = select(samples, "gateway_capacity").filter(({ value }) => value > 0); // a model that was removed has no places
  const places = present.map(({ labels: { model, kind }, value: capacity }) => {
    const taken = total(samples, "gateway_in_flight", { model, kind });
    const waiting = total(samples, "gateway_waiting", { model, kind });
    return meter(`${PLACES[kind] ?? kind}, ${model}`, `${taken} of ${capacity}${waiting ? `, ${waiting} wait` : ""}`, taken / capacity);
  });
  const queues = select(samples, "gateway_queue_depth").map(({ labels: { model, version, kind }, value }) => {
    const room = total(samples, "gateway_queue_capacity", { model, version, kind });
    return meter(`Queue of ${model} ${version}, ${kind}`, room ? `${value} of ${room}` : String(value), room ? value / room : 0);
  });
  $("places").replaceChildren(...places, ...queues);
}

function showRefused() {
  const { samples } = readings.at(-1);
  const codes = Object.entries(totals(samples, "gateway_refused_total", "code")).sort(([, a], [, b]) => b - a);
  const most = codes[0]?.[1] ?? 0;
  const lately = (code) => growth(readings[0].samples, samples, "gateway_refused_total", { code });
  $("refused").replaceChildren(...codes.map(([code, count]) => meter(code, `${count} in all, ${lately(code)} lately`, count / most, "bad")));
  if (codes.length === 0) $("refused").replaceChildren(h("li", { className: "muted", textContent: "None since the gateway started." }));
}

async function keepUpdating() {
  try {
    if (!document.hidden) await update();
  } catch (error) {
    $("message").textContent = `${error instanceof Problem ? error.message : `The page failed: ${error.message}.`} This page asks again by itself.`;
    show($("message"));
    if (error.status === 401) return; // the person closed the dialog: ask again only by the button
    if (!(error instanceof Problem)) console.error(error);
  }
  setTimeout(keepUpdating, EVERY_MS);
}

connectKey(() => { if (!$("message").hidden) location.reload(); });
show($("key-open"), Boolean(apiKey()));
call("page/config.json").then(({ data }) => show($("key-open"), data.asks_for_keys)).catch(() => {});
keepUpdating();
