// @ts-check
/**
 * What is kept to be used again, how quantised weights are computed, and what was moved last.
 */

import { h } from "./dom.js";
import { counted, size } from "./units.js";

/** @typedef {import("./report.js").Report} Report */

const EVENTS = 6; // the last ones

export function caches() {
  const kept = h("ul", { class: "sl-list", "aria-label": "Caches" });
  const dispatch = h("ul", { class: "sl-list", "aria-label": "How weights are computed" });
  const events = h("ol", { class: "sl-list sl-events", "aria-label": "What moved last" });
  let shown = "";
  return {
    element: h("div", {}, kept, dispatch, events),
    /** @param {Report} report */
    update(report) {
      const last = report.events.slice(-EVENTS);
      const next = JSON.stringify([report.caches, report.dispatch, last]);
      if (next === shown) return;
      shown = next;
      kept.replaceChildren(...report.caches.map((cache) => row(cache.name, cacheText(cache))));
      dispatch.replaceChildren(...report.dispatch.map((one) => row(`on ${one.what}`, one.choice)));
      events.replaceChildren(
        ...last.map((event) => row(`${event.what} ${event.action}`, `${size(event.nbytes)}: ${event.why}`)),
      );
    },
  };
}

/** @param {string} name @param {string} text */
function row(name, text) {
  return h("li", {}, h("span", { class: "sl-name", title: name }, name), h("span", {}, text));
}

/** @param {Report["caches"][number]} cache */
function cacheText(cache) {
  if (cache.bytes === null) return `${cache.entries} kept`;
  const bytes = `${size(cache.bytes)} of ${size(cache.bound_bytes)}`;
  const misses = counted(cache.misses ?? 0, "miss", "misses");
  const hits = cache.hits === null ? "" : `, ${counted(cache.hits, "hit")}, ${misses}`;
  return `${counted(cache.entries, "file")}, ${bytes}${hits}`;
}
