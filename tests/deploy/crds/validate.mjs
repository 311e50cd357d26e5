// Reads a JSON list of manifests from standard input. Prints a JSON list with the error of each, or an empty string.
//
// The validators ignore names that they do not know. They read every name that they know, so a name that they have not
// read, in an object of which they have read another one, is refused here. The packages' own classes validate a copy,
// of which all names are read, so this imports the functions behind them.
import { readFileSync } from "node:fs";

const MONITORING = "prometheus-operator/_schemas/ComGithubPrometheusOperatorPrometheusOperatorPkgApisMonitoringV1";
const FILES = {
  HTTPRoute: "gateway-api/_schemas/IoK8sSigsGatewayApiApisV1HTTPRoute.js",
  PrometheusRule: `${MONITORING}PrometheusRule.js`,
  ScaledObject: "keda/_schemas/ComGithubKedacoreKedaV2ApisKedaV1alpha1ScaledObject.js",
  ServiceMonitor: `${MONITORING}ServiceMonitor.js`,
};

// Returns a copy of `value`, and notes in `read` which names of its objects are read.
function noted(value, read) {
  if (value === null || typeof value !== "object") return value;
  const copy = Array.isArray(value) ? [] : {};
  for (const [name, inner] of Object.entries(value)) copy[name] = noted(inner, read);
  if (Array.isArray(value)) return copy;
  const names = new Set();
  read.push({ names, has: Object.keys(value) });
  const get = (target, name) => {
    names.add(name);
    return target[name];
  };
  return new Proxy(copy, { get });
}

async function errorOf(manifest) {
  const { validate } = await import(`./node_modules/@kubernetes-models/${FILES[manifest.kind]}`);
  const read = [];
  if (!validate(noted(manifest, read))) {
    return validate.errors.map((error) => `${error.instancePath} ${error.keyword}`).join(", ");
  }
  const unknown = read.flatMap(({ names, has }) => (names.size ? has.filter((name) => !names.has(name)) : []));
  return unknown.length ? `unknown names: ${unknown.join(", ")}` : "";
}

const errors = [];
for (const manifest of JSON.parse(readFileSync(0, "utf8"))) errors.push(await errorOf(manifest));
console.log(JSON.stringify(errors));
