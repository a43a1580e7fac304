// @ts-check
/**
 * What is kept to be used again, how quantised weights are computed, and what was moved last.
 */

import { h } from "./dom.js";
import { size } from "./units.js";
import { counted, listed, named, t } from "./words.js";

/** @typedef {import("./report.js").Report} Report */

const EVENTS = 6; // the last ones

export function caches() {
  const kept = h("ul", { class: "sl-list", "aria-label": t("caches") });
  const dispatch = h("ul", { class: "sl-list", "aria-label": t("dispatch") });
  const events = h("ol", { class: "sl-list sl-events", "aria-label": t("events") });
  let shown = "";
  return {
    element: h("div", {}, kept, dispatch, events),
    /** @param {Report} report */
    update(report) {
      const last = report.events.slice(-EVENTS);
      const next = JSON.stringify([report.caches, report.dispatch, last]);
      if (next === shown) return;
      shown = next;
      kept.replaceChildren(...report.caches.map((cache) => row(named("cache", cache.name), cacheText(cache))));
      const ways = report.dispatch.map((one) => row(t("dispatch_on", { device: one.what }), one.choice));
      dispatch.replaceChildren(...ways);
      events.replaceChildren(
        ...last.map((event) => row(eventText(event), `${size(event.nbytes)}: ${event.why}`)),
      );
    },
  };
}

/** @param {string} name @param {string} text */
function row(name, text) {
  return h("li", {}, h("span", { class: "sl-name", title: name }, name), h("span", {}, text));
}

/** @param {Report["events"][number]} event */
function eventText(event) {
  return t("event", { what: event.what, action: named("action", event.action) });
}

/** @param {Report["caches"][number]} cache */
function cacheText(cache) {
  if (cache.bytes === null) return t("cache_kept", { count: cache.entries });
  const bytes = t("cache_filled", { size: size(cache.bytes), bound: size(cache.bound_bytes) });
  const uses = cache.hits === null ? [] : [counted("hits", cache.hits), counted("misses", cache.misses ?? 0)];
  return listed([counted("files", cache.entries), bytes, ...uses]);
}
