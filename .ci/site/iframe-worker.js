// A page opened as a file may start no Worker, in which the search box of the site runs: there it runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }));
      const inner = frame.contentWindow;
      const event = (type, data) => Object.assign(new Event(type), { data });
      inner.postMessage = (data) => this.dispatchEvent(event("message", data));
      inner.importScripts = (...urls) => urls.reduce((before, one) => before.then(() => this.load(inner, one)), Promise.resolve());
      this.loaded = this.load(inner, url);
      this.postMessage = (data) => this.loaded.then(() => inner.dispatchEvent(event("message", data)));
      this.terminate = () => frame.remove();
      this.onmessage = null;
      this.addEventListener("message", (message) => this.onmessage?.(message));
    }
    load(inner, url) {
      return new Promise((resolve, reject) => {
        const script = inner.document.createElement("script");
        Object.assign(script, { src: new URL(url, location.href).href, onload: resolve, onerror: reject });
        inner.document.head.append(script);
      });
    }
  };
}
