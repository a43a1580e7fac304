// @ts-check
/**
 * What a pass through a streamed model costs: compute beside copies, the longer of which the pass waits for.
 */

import { h, setAttributes, setText, show } from "./dom.js";
import { duration } from "./units.js";
import { counted, listed, number, t } from "./words.js";

/** @typedef {import("./report.js").Model} Model */

/** @type {Record<string, "compute_binds" | "copy_binds">} */
const MEANING = { compute: "compute_binds", copy: "copy_binds" };

export function stepTimes() {
  const rows = { compute: row("compute"), copy: row("copies") };
  const total = h("p", { class: "sl-step-total" });
  const meaning = h("p", { class: "sl-note" });
  const element = h("div", { class: "sl-step", role: "group", "aria-label": t("last_pass") });
  element.append(total, rows.compute.element, rows.copy.element, meaning);
  return {
    element,
    /** @param {Model} model */
    update(model) {
      const step = model.last_step;
      show(element, step !== null);
      if (!step) return;
      const pass = { time: duration(step.ms), speed: number(step.gb_per_s, 2) };
      const link = model.plan ? number(model.plan.link_gb_per_s, 2) : "";
      const misses = model.misses ? counted("unforeseen", model.misses) : "";
      setText(total, listed([link ? t("pass_of_link", { ...pass, link }) : t("pass", pass), misses]));
      const longest = Math.max(step.compute_ms ?? 0, step.copy_ms, 1e-6);
      rows.compute.update(step.compute_ms, longest, step.bound_by === "compute");
      rows.copy.update(step.copy_ms, longest, step.bound_by === "copy");
      const known = MEANING[step.bound_by];
      setText(meaning, known ? t(known) : "");
    },
  };
}

/** @param {"compute" | "copies"} label */
function row(label) {
  const bar = h("span", { class: "sl-time-fill" });
  const value = h("span", { class: "sl-time-value" });
  const element = h("div", { class: `sl-time sl-time-${label}` });
  element.append(h("span", { class: "sl-time-label" }, t(label)), h("span", { class: "sl-time-bar" }, bar), value);
  return {
    element,
    /** @param {number | null} milliseconds @param {number} longest @param {boolean} binds */
    update(milliseconds, longest, binds) {
      setAttributes(bar, { style: `width: ${(100 * (milliseconds ?? 0)) / longest}%` });
      setAttributes(element, { "data-binds": binds ? "" : null });
      const time = milliseconds === null ? t("not_measured") : duration(milliseconds);
      setText(value, binds ? t("binds", { time }) : time);
    },
  };
}
