// @ts-check
/**
 * What a pass through a streamed model costs: compute beside copies, the longer of which the pass waits for.
 */

import { h, setAttributes, setText, show } from "./dom.js";
import { duration } from "./units.js";

/** @typedef {import("./report.js").Model} Model */

/** @type {Record<string, string>} */
const MEANING = {
  compute: "Compute binds: it takes longer than the copies, which run beside it.",
  copy: "Copies bind: more VRAM for weights, a smaller quantisation or a faster weight source makes the step shorter.",
};

export function stepTimes() {
  const rows = { compute: row("compute"), copy: row("copies") };
  const total = h("p", { class: "sl-step-total" });
  const meaning = h("p", { class: "sl-note" });
  const element = h("div", { class: "sl-step", role: "group", "aria-label": "The last pass" });
  element.append(total, rows.compute.element, rows.copy.element, meaning);
  return {
    element,
    /** @param {Model} model */
    update(model) {
      const step = model.last_step;
      show(element, step !== null);
      if (!step) return;
      const link = model.plan ? ` of ${model.plan.link_gb_per_s.toFixed(2)}` : "";
      const misses = model.misses ? `, ${model.misses} waited for unforeseen copies` : "";
      setText(total, `Last pass ${duration(step.ms)}, ${step.gb_per_s.toFixed(2)}${link} GB/s${misses}`);
      const longest = Math.max(step.compute_ms ?? 0, step.copy_ms, 1e-6);
      rows.compute.update(step.compute_ms, longest, step.bound_by === "compute");
      rows.copy.update(step.copy_ms, longest, step.bound_by === "copy");
      setText(meaning, MEANING[step.bound_by] ?? "");
    },
  };
}

/** @param {string} label */
function row(label) {
  const bar = h("span", { class: "sl-time-fill" });
  const value = h("span", { class: "sl-time-value" });
  const element = h("div", { class: `sl-time sl-time-${label}` });
  element.append(h("span", { class: "sl-time-label" }, label), h("span", { class: "sl-time-bar" }, bar), value);
  return {
    element,
    /** @param {number | null} milliseconds @param {number} longest @param {boolean} binds */
    update(milliseconds, longest, binds) {
      setAttributes(bar, { style: `width: ${(100 * (milliseconds ?? 0)) / longest}%` });
      setAttributes(element, { "data-binds": binds ? "" : null });
      const said = milliseconds === null ? "not measured yet" : duration(milliseconds);
      setText(value, binds ? `${said}, binds` : said);
    },
  };
}
