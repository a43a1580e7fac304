// @ts-check
/**
 * The server's report as it changes: the event `sluice.memory` while prompts run, and `GET /sluice/report` otherwise.
 * docs/report.md says what is in it.
 */

// @ts-ignore: ComfyUI serves it
import { api } from "../../../../scripts/api.js";
import { t } from "./words.js";

const ROUTE = "/sluice/report";
const EVENT = "sluice.memory";
// How long nothing may be told before the server is asked: a step may take long, and models are also unloaded without
// a prompt.
const POLL_MS = { running: 1000, idle: 5000 };

/**
 * @typedef {{name: string, bytes: number, resident_bytes: number | null, streamed_bytes: number,
 *   compute_ms: number | null}} Block
 * @typedef {{total: number, resident: number, streamed: number, on_disk: number, in_ram: number, ring: number}} Parts
 * @typedef {{ms: number, compute_ms: number | null, copy_ms: number, gb_per_s: number, bound_by: string}} Step
 * @typedef {{name: string, strength: number, way: string, weights: number, bytes: number}} Lora
 * @typedef {{name: string, kind: string, class: string, files: {name: string, bytes: number | null, state: string}[],
 *   architecture: string | null, quant_types: Record<string, number>, device: string, managed_by: string, bytes: Parts,
 *   source: {kind: string, reason: string, pinned_bytes: number} | null,
 *   plan: {text: string, link_gb_per_s: number, budget_bytes: number | null} | null, last_step: Step | null,
 *   current_block: number | null, blocks: Block[], passes: number, misses: number, loras: Lora[],
 *   unified_memory: {mode: string, bytes: number, reason: string} | null,
 *   patches: {at_use: number, bytes: number, by_comfyui: number}}} Model
 * @typedef {{prompt_id: string | null, columns: string[], samples: (number | null)[][],
 *   peak: Record<string, number | null>,
 *   marks: {ms: number, stage: string | null, label: string | null}[]}} Timeline
 * @typedef {{id: string, running: boolean, stage: string | null, node: string | null, step: number, steps: number,
 *   step_ms: number | null}} Prompt
 * @typedef {{prompt: Prompt | null, models: Model[], timeline: Timeline,
 *   host_ram: Record<string, number | null>,
 *   vram: {device: string, name: string, allocated: number | null, reserved: number | null, free: number,
 *     total: number}[],
 *   caches: {name: string, bytes: number | null, bound_bytes: number | null, entries: number, hits: number | null,
 *     misses: number | null}[],
 *   dispatch: {what: string, choice: string}[],
 *   events: {time_ms: number, action: string, what: string, nbytes: number, why: string}[]}} Report
 */

/** Tells `onReport` of each new report and `onError` of what stands in the way, from `start` to `stop`. */
export class ReportFeed {
  /** @param {(report: Report) => void} onReport @param {(reason: string) => void} onError */
  constructor(onReport, onError) {
    this._onReport = onReport;
    this._onError = onError;
    this._told = 0;
    this._patience = POLL_MS.idle;
    /** @type {number | undefined} */
    this._timer = undefined;
    this._asking = false;
    this._stopped = true;
    this._onEvent = (/** @type {CustomEvent} */ event) => this._tell(event.detail);
    this._refresh = () => void this.refresh();
  }

  start() {
    this._stopped = false;
    api.addEventListener(EVENT, this._onEvent);
    api.addEventListener("reconnected", this._refresh);
    this._timer = window.setInterval(() => {
      if (!document.hidden && Date.now() - this._told >= this._patience) this._refresh();
    }, POLL_MS.running);
    return this.refresh();
  }

  stop() {
    this._stopped = true;
    api.removeEventListener(EVENT, this._onEvent);
    api.removeEventListener("reconnected", this._refresh);
    window.clearInterval(this._timer);
  }

  /** Ask the server now. */
  async refresh() {
    if (this._asking) return; // the server is slow: one question at a time
    this._asking = true;
    try {
      const answer = await api.fetchApi(ROUTE, { cache: "no-store" });
      if (!answer.ok) throw new Error(t("server_answers", { status: `${answer.status} ${answer.statusText}` }));
      const report = await answer.json();
      if (!this._stopped) this._tell(report);
    } catch (error) {
      this._told = Date.now();
      if (!this._stopped) this._onError(error instanceof Error ? error.message : String(error));
    } finally {
      this._asking = false;
    }
  }

  /** @param {Report} report */
  _tell(report) {
    this._told = Date.now();
    this._patience = report.prompt?.running ? POLL_MS.running : POLL_MS.idle;
    this._onReport(report);
  }
}
