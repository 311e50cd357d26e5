// Small helpers for the document.

/** Return the element with this id. */
export const $ = (id) => document.getElementById(id);

/** Return a new element with properties and children; strings become text, never HTML. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Show an element if `is` is true, hide it otherwise. */
export const show = (element, is = true) => { element.hidden = !is; };

/** Return a number from 0 to 1 as a percentage; never 100 % for less than all of it. */
export function percent(value, digits = 0) {
  const scale = 10 ** digits;
  const shown = value < 1 ? Math.min(Math.round(value * 100 * scale), 100 * scale - 1) / scale : 100;
  return `${shown.toFixed(digits)}\u00a0%`;
}

/** Return a confidence with as many digits as it deserves. */
export const confidence = (value) => percent(value, value < 0.01 ? 2 : value > 0.9 || value < 0.1 ? 1 : 0);

/** Fill a select with [value, text] pairs and keep its value if it still exists. */
export function fill(select, options, value = select.value) {
  select.replaceChildren(...options.map(([key, text]) => h("option", { value: key, textContent: text })));
  if (options.some(([key]) => key === value)) select.value = value;
}

/** Return a function that runs `task` now, or once more after the present run; calls in between are merged. */
export function latest(task) {
  let running = false;
  let waiting = null;
  return async function run(...values) {
    waiting = values;
    if (running) return;
    running = true;
    try {
      while (waiting) {
        const next = waiting;
        waiting = null;
        await task(...next);
      }
    } finally {
      running = false;
    }
  };
}
