// @ts-check
/**
 * How far the prompt is. Only a change of stage is announced: steps come too often to be read out.
 */

import { h, setAttributes, setText, show } from "./dom.js";
import { duration } from "./units.js";
import { listed, named, t } from "./words.js";

/** @typedef {import("./report.js").Prompt} Prompt */

/** @param {() => void} onRefresh */
export function status(onRefresh) {
  const stage = h("span", { class: "sl-stage-now", role: "status" }, t("status_asking"));
  const steps = h("span", { class: "sl-steps" });
  const label = t("refresh");
  const refresh = h("button", { type: "button", class: "sl-button", title: label, "aria-label": label });
  refresh.append(h("i", { class: "pi pi-refresh", "aria-hidden": "true" }));
  refresh.addEventListener("click", onRefresh);
  const progress = h("progress", { class: "sl-progress", "aria-label": t("steps"), max: 1, value: 0 });
  const problem = h("p", { class: "sl-problem", role: "alert" });
  show(problem, false);
  return {
    element: h("header", { class: "sl-status" }, h("div", {}, stage, steps, refresh), progress, problem),
    /** @param {Prompt | null} prompt */
    update(prompt) {
      show(problem, false);
      setText(stage, stageText(prompt));
      setText(steps, prompt ? stepsText(prompt) : "");
      const steady = !prompt?.running || prompt.steps === 0;
      setAttributes(progress, { max: steady ? 1 : prompt.steps, value: steady ? 0 : prompt.step });
    },
    /** @param {string} reason */
    fail(reason) {
      setText(stage, t("status_failed"));
      setText(problem, t("report_failed", { reason }));
      show(problem, true);
    },
  };
}

/** @param {Prompt | null} prompt */
function stageText(prompt) {
  if (!prompt) return t("status_never");
  if (!prompt.running) return t("status_idle");
  return prompt.stage ? named("status", prompt.stage) : t("status_running");
}

/** @param {Prompt} prompt */
function stepsText(prompt) {
  const each = prompt.step_ms === null ? "" : t("time_a_step", { time: duration(prompt.step_ms) });
  const counts = prompt.running && prompt.steps > 1;
  return listed([counts ? t("step_of", { step: prompt.step, steps: prompt.steps }) : "", each]);
}
