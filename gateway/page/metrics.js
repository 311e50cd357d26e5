// Prometheus's text format: parse it, and compute rates and quantiles from two readings of the counters.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** Return {name: [{labels, value}, …]} of a text. */
export function parse(text) {
  const samples = {};
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : LINE.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    (samples[found[1]] ??= []).push({ labels, value: Number(found[3]) });
  }
  return samples;
}

/** Return the samples of a metric whose labels are `wanted`. */
export const select = (samples, name, wanted = {}) =>
  (samples[name] ?? []).filter(({ labels }) => Object.entries(wanted).every(([key, value]) => labels[key] === value));

/** Return their sum. */
export const total = (samples, name, wanted) => select(samples, name, wanted).reduce((sum, { value }) => sum + value, 0);

/** Return {label: sum} of a metric by one label. */
export function totals(samples, name, label, wanted) {
  const sums = {};
  for (const { labels, value } of select(samples, name, wanted)) sums[labels[label]] = (sums[labels[label]] ?? 0) + value;
  return sums;
}

/** Return how much a counter grew from the reading `a` to `b`; a restart begins at 0. */
export function growth(a, b, name, wanted) {
  const grown = total(b, name, wanted) - total(a, name, wanted);
  return grown >= 0 ? grown : total(b, name, wanted);
}

/** Return a quantile of what a histogram observed between two readings, linear within its bucket; null if nothing. */
export function quantile(a, b, name, share, wanted) {
  const before = totals(a, `${name}_bucket`, "le", wanted);
  const bounds = Object.entries(totals(b, `${name}_bucket`, "le", wanted))
    .map(([bound, count]) => [bound === "+Inf" ? Infinity : Number(bound), count - (before[bound] ?? 0)])
    .sort(([x], [y]) => x - y);
  const all = bounds.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  let low = 0;
  let below = 0;
  for (const [bound, count] of bounds) {
    if (count >= share * all) return bound === Infinity ? low : low + ((bound - low) * (share * all - below)) / (count - below);
    [low, below] = [bound, count];
  }
  return low;
}
