// @ts-check
/**
 * The live view: everything that the report says, in the order in which one asks.
 */

import { caches } from "./caches.js";
import { h, show } from "./dom.js";
import { machine } from "./machine.js";
import { modelCard } from "./model_card.js";
import { ReportFeed } from "./report.js";
import { status } from "./status.js";
import { timeline } from "./timeline.js";
import { spoken, t } from "./words.js";

/** @typedef {import("./report.js").Report} Report */

const ORDER = ["diffusion_model", "text_encoder", "vae", "other"]; // the last used first would jump about

/**
 * Fill `container` with the live view, in the language that is spoken now.
 *
 * @param {HTMLElement} container
 * @returns {() => void} what ends it
 */
export function mountPanel(container) {
  const head = status(() => void feed.refresh());
  const chart = timeline();
  const memory = machine();
  const kept = caches();
  const none = h("p", { class: "sl-empty" }, t("no_models"));
  const models = h("div", { class: "sl-models" });
  const sections = [
    section(t("section_timeline"), chart.element),
    section(t("section_models"), none, models),
    section(t("section_machine"), memory.element),
    section(t("section_caches"), kept.element),
  ];
  const root = h("div", { class: "sluice-live", role: "region", lang: spoken(), "aria-label": t("region") });
  root.append(head.element, ...sections);
  container.replaceChildren(root);
  /** @type {Map<string, ReturnType<typeof modelCard>>} by model, so that what is focused in one stays */
  const cards = new Map();

  const feed = new ReportFeed(update, (reason) => {
    head.fail(reason);
  });
  const resized = new ResizeObserver(() => chart.redraw());
  resized.observe(root);
  for (const part of sections) show(part, false); // until there is something to tell
  void feed.start();

  /** @param {Report} report */
  function update(report) {
    for (const part of sections) show(part, true);
    head.update(report.prompt);
    updateModels([...report.models].sort((one, other) => ORDER.indexOf(one.kind) - ORDER.indexOf(other.kind)));
    show(none, report.models.length === 0);
    chart.update(report.timeline);
    memory.update(report);
    kept.update(report);
  }

  /** @param {import("./report.js").Model[]} loaded */
  function updateModels(loaded) {
    /** @type {Set<string>} */
    const keys = new Set();
    for (const model of loaded) {
      let key = `${model.kind} ${model.name}`;
      while (keys.has(key)) key += "+"; // the same file, loaded twice
      const card = cards.get(key) ?? modelCard();
      const place = models.children[keys.size] ?? null;
      if (place !== card.element) models.insertBefore(card.element, place);
      cards.set(key, card);
      keys.add(key);
      card.update(model);
    }
    for (const [key, card] of cards) {
      if (keys.has(key)) continue;
      card.element.remove();
      cards.delete(key);
    }
  }

  return () => {
    feed.stop();
    resized.disconnect();
    root.remove();
  };
}

/** @param {string} title @param {...Node} content */
function section(title, ...content) {
  return h("section", { "aria-label": title }, h("h2", {}, title), ...content);
}
