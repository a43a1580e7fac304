// @ts-check
/**
 * How far the prompt is. Only a change of stage is announced: steps come too often to be read out.
 */

import { h, setAttributes, setText, show } from "./dom.js";
import { duration } from "./units.js";

/** @typedef {import("./report.js").Prompt} Prompt */

/** @type {Record<string, string>} */
const STAGES = { load: "Loading", encode: "Encoding the text", sample: "Sampling", decode: "Decoding" };

/** @param {() => void} onRefresh */
export function status(onRefresh) {
  const stage = h("span", { class: "sl-stage-now", role: "status" }, "Asking the server");
  const steps = h("span", { class: "sl-steps" });
  const refresh = h("button", { type: "button", class: "sl-button", title: "Refresh", "aria-label": "Refresh" });
  refresh.append(h("i", { class: "pi pi-refresh", "aria-hidden": "true" }));
  refresh.addEventListener("click", onRefresh);
  const progress = h("progress", { class: "sl-progress", "aria-label": "Steps", max: 1, value: 0 });
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
      setText(stage, "No report");
      setText(problem, `The server's report could not be read: ${reason}. It is asked again every few seconds.`);
      show(problem, true);
    },
  };
}

/** @param {Prompt | null} prompt */
function stageText(prompt) {
  if (!prompt) return "Idle, no prompt has run yet";
  if (!prompt.running) return "Idle";
  return prompt.stage ? (STAGES[prompt.stage] ?? prompt.stage) : "Running";
}

/** @param {Prompt} prompt */
function stepsText(prompt) {
  const each = prompt.step_ms === null ? "" : `${duration(prompt.step_ms)} a step`;
  const count = prompt.running && prompt.steps > 1 ? `${prompt.step} of ${prompt.steps}` : "";
  return [count, each].filter(Boolean).join(", ");
}
