// A page opened from the disk may start no worker, so there the search runs in a hidden frame instead.

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #loaded = new Promise((resolve) => { this.#frame.onload = resolve; });

    constructor(url) {
      super();
      this.#frame.hidden = true;
      this.#frame.srcdoc = `<script>postMessage = (data) => parent.postMessage(data, "*")</script><script src="${url}"></script>`;
      document.documentElement.append(this.#frame);
      addEventListener("message", ({ source, data }) => {
        if (source === this.#frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data }));
      });
    }

    async postMessage(data) {
      await this.#loaded;
      this.#frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })); // its postMessage answers
    }
  };
}
