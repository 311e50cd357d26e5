// The last calls as code, and where their time went.

import { $, h, show } from "./dom.js";
import { apiKey } from "./api.js";

const LANGUAGES = { curl, python, javascript };
const STAGES = { body: "reading the image", wait: "waiting for a place", model: "the model", rest: "the rest of the gateway", network: "network and browser" };
let shown = { name: "image.png", query: {} };

/** Set what the code is about: the image's name, and the query of /explain without defaults. */
export function showCode(name, query) {
  shown = { name: name.replace(/[^\w.-]+/g, "_"), query: Object.fromEntries(Object.entries(query).filter(([, value]) => value)) };
  write();
}

const language = () => document.querySelector("#code-tabs [aria-selected=true]").dataset.language;
const address = (path, query) => new URL(`${path}${Object.keys(query).length ? `?${new URLSearchParams(query)}` : ""}`, document.baseURI).href;

function write() {
  $("code").textContent = LANGUAGES[language()](shown.name, shown.query);
}

function curl(name, { model, version, ...query }) {
  const key = apiKey() ? ' -H "x-api-key: $GRADSERVE_KEY"' : "";
  const one = pick({ model, version }, ["model", "version"]);
  return [
    `curl -f${key} -F file=@${name} \\\n  '${address("predict", { top_k: 5, ...one })}'`,
    `curl -f${key} -F file=@${name} -H 'accept: application/json' \\\n  '${address("explain", { ...query, ...one })}'`,
    `curl -f${key} -F file=@${name} -o heatmap.png \\\n  '${address("explain", { size: 512, ...pick(query, ["target", "method"]), ...one })}'`,
  ].join("\n\n");
}

function python(name, query) {
  const given = (names) => Object.entries(pick(query, names)).map(([key, value]) => `, ${key}=${JSON.stringify(value)}`).join("");
  const key = apiKey() ? ', key=os.environ["GRADSERVE_KEY"]' : "";
  return `${apiKey() ? "import os\n" : ""}from pathlib import Path

from gradserve import Client

image = Path(${JSON.stringify(name)})
with Client(${JSON.stringify(address("", {}).replace(/\/$/, ""))}${key}) as client:
    answer = client.predict(image, top_k=5${given(["model", "version"])})
    evidence = client.evidence(image${given(["target", "method", "coverage", "model", "version"])})
print(answer.class_name, answer.confidence)
evidence.heatmap.image().save("heatmap.png")`;
}

function javascript(name, { model, version, ...query }) {
  const headers = apiKey() ? '{ "x-api-key": key, accept: "application/json" }' : '{ accept: "application/json" }';
  const one = pick({ model, version }, ["model", "version"]);
  return `const body = await (await fetch(${JSON.stringify(name)})).blob();
const headers = ${headers};
const post = async (url) => (await fetch(url, { method: "POST", headers, body })).json();

const answer = await post(${JSON.stringify(address("predict", { top_k: 5, ...one }))});
const evidence = await post(
  ${JSON.stringify(address("explain", { ...query, ...one }))},
);
console.log(answer.class, answer.confidence, evidence.heatmap);`;
}

const pick = (query, names) => Object.fromEntries(names.filter((name) => query[name]).map((name) => [name, query[name]]));

/** Show where the time of a call went; `route` is predict or explain. */
export function showTimings(route, { ms, stages }) {
  const known = Object.fromEntries(stages);
  const gateway = known.total ?? 0;
  const parts = { ...pick(known, ["body", "wait", "model"]) };
  parts.rest = Math.max(0, gateway - Object.values(parts).reduce((sum, value) => sum + value, 0));
  parts.network = Math.max(0, ms - gateway);
  const bar = h("span", { className: "stages" }, ...Object.entries(parts).map(([name, value]) => {
    const part = h("span", { className: `stage-${name}`, title: `${STAGES[name]}: ${value.toFixed(1)} ms` });
    part.style.flexGrow = value;
    return part;
  }));
  const list = Object.entries(parts).filter(([, value]) => value >= 0.05).map(([name, value]) => h("li", { className: `stage-${name}`, textContent: `${STAGES[name]} ${value.toFixed(1)} ms` }));
  $(`time-${route}`).replaceChildren(h("p", {}, h("strong", { textContent: `/${route}` }), ` ${ms.toFixed(0)} ms`), bar, h("ul", {}, ...list));
  show($("how"));
}

/** Make the tabs work: by pointer, and by the arrow keys. */
export function connectCode() {
  const tabs = [...document.querySelectorAll("#code-tabs [role=tab]")];
  const choose = (tab) => {
    for (const other of tabs) {
      other.setAttribute("aria-selected", other === tab);
      other.tabIndex = other === tab ? 0 : -1;
    }
    $("code-panel").setAttribute("aria-labelledby", tab.id);
    write();
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  });
  $("copy").addEventListener("click", async () => {
    let text = "Copied";
    try {
      await navigator.clipboard.writeText($("code").textContent);
    } catch {
      getSelection().selectAllChildren($("code"));
      text = "Selected: copy it with Ctrl+C";
    }
    $("copied").textContent = text;
    setTimeout(() => { $("copied").textContent = ""; }, 3000);
  });
}
