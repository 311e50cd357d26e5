// The dialog that asks for an API key. The key stays in this tab's session storage.

import { $ } from "./dom.js";
import { onKeyNeeded, setApiKey } from "./api.js";

/** Ask for a key when a call needs one; `changed()` runs when there is a new one. */
export function connectKey(changed) {
  const ask = (reason) => askKey(reason, changed);
  onKeyNeeded(ask);
  $("key-open").addEventListener("click", () => ask("This gateway answers callers with a key. It stays in this tab and is forgotten when you close it."));
}

let asked = null;

/** Resolve to true if the person gave a key. Calls that fail together ask once. */
function askKey(reason, changed) {
  asked ??= new Promise((done) => {
    const dialog = $("key-dialog");
    $("key-why").textContent = reason;
    $("key").value = "";
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asked = null;
      const key = $("key").value.trim();
      const isGiven = dialog.returnValue === "use" && key !== "";
      if (isGiven) {
        setApiKey(key);
        changed();
      }
      done(isGiven);
    }, { once: true });
  });
  return asked;
}
