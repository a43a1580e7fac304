// @ts-check
/**
 * Memory as it is now: each GPU's, and the machine's RAM.
 */

import { h, setText } from "./dom.js";
import { stackedBar } from "./stacked_bar.js";
import { size } from "./units.js";
import { t } from "./words.js";

/** @typedef {import("./report.js").Report} Report */

export function machine() {
  const element = h("div", { class: "sl-machine" });
  /** @type {ReturnType<typeof meter>[]} */
  const meters = [];
  return {
    element,
    /** @param {Report} report */
    update(report) {
      const several = report.vram.length > 1;
      const shown = [...report.vram.map((one) => gpu(one, several)), ram(report.host_ram)];
      while (meters.length < shown.length) {
        meters.push(meter());
        element.append(meters[meters.length - 1].element);
      }
      while (meters.length > shown.length) meters.pop()?.element.remove();
      shown.forEach((one, index) => meters[index].update(one));
    },
  };
}

function meter() {
  const title = h("h3", {});
  const free = h("span", { class: "sl-free" });
  const bar = stackedBar(t("ram"));
  return {
    element: h("div", { class: "sl-meter" }, h("header", {}, title, free), bar.element),
    /** @param {{title: string, free: number | null, total: number, parts: import("./stacked_bar.js").Part[]}} shown */
    update(shown) {
      setText(title, shown.title);
      setText(free, t("free_of", { free: size(shown.free), total: size(shown.total) }));
      bar.element.setAttribute("aria-label", shown.title);
      bar.update(shown.parts, shown.total);
    },
  };
}

/** @param {Report["vram"][number]} gpu @param {boolean} several */
function gpu(gpu, several) {
  const allocated = gpu.allocated ?? 0;
  const reserved = Math.max((gpu.reserved ?? 0) - allocated, 0);
  const used = gpu.total - gpu.free;
  return {
    title: several ? `${gpu.device} ${gpu.name}` : gpu.name,
    free: gpu.free,
    total: gpu.total,
    parts: [
      { key: "resident", label: t("vram_allocated"), bytes: allocated },
      { key: "ring", label: t("vram_reserved"), bytes: reserved },
      { key: "others", label: t("vram_others"), bytes: Math.max(used - allocated - reserved, 0) },
    ],
  };
}

/** @param {Report["host_ram"]} ram */
function ram(ram) {
  const total = ram.total ?? 0;
  const anonymous = ram.anonymous ?? ram.resident ?? 0;
  const shared = ram.shared ?? 0;
  return {
    title: t("ram"),
    free: ram.available,
    total,
    parts: [
      { key: "anonymous", label: t("ram_comfyui"), bytes: anonymous + shared },
      { key: "others", label: t("ram_others"), bytes: Math.max(total - (ram.available ?? 0) - anonymous - shared, 0) },
      { key: "files", label: t("ram_files"), bytes: ram.file ?? 0 },
    ],
  };
}
