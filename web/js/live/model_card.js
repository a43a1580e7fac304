// @ts-check
/**
 * One loaded model: what it is, where its bytes are, its blocks, what a pass costs, its LoRAs.
 */

import { blockMap, place } from "./block_map.js";
import { h, setAttributes, setText, show } from "./dom.js";
import { stackedBar } from "./stacked_bar.js";
import { stepTimes } from "./step_times.js";
import { counted, percent, size } from "./units.js";

/** @typedef {import("./report.js").Model} Model */

/** @type {Record<string, string>} */
const KINDS = { diffusion_model: "diffusion model", text_encoder: "text encoder", vae: "VAE", other: "other" };
/** @type {Record<string, string>} */
const SOURCES = { page_cache: "the file cache", pinned: "locked RAM", disk: "the disk", memory: "RAM" };

export function modelCard() {
  const name = h("h3", {});
  const kind = h("span", { class: "sl-chip" });
  const about = h("p", { class: "sl-note" });
  const total = h("p", { class: "sl-total" });
  const bytes = stackedBar("Where the weights are");
  const types = h("p", { class: "sl-note" });
  const blocks = blockMap();
  const step = stepTimes();
  const source = h("details", {}, h("summary", {}), h("p", { class: "sl-note" }), h("p", { class: "sl-note" }));
  const loras = h("ul", { class: "sl-list sl-loras", "aria-label": "LoRAs" });
  const patches = h("p", { class: "sl-note" });
  const inPlace = h("p", { class: "sl-note" });
  const element = h("article", { class: "sl-card" }, h("header", {}, name, kind), about, total, bytes.element, types);
  element.append(blocks.element, step.element, source, inPlace, loras, patches);

  return {
    element,
    /** @param {Model} model */
    update(model) {
      setText(name, model.name);
      setAttributes(name, { title: model.files.map((file) => file.name).join("\n") || model.name });
      setAttributes(element, { "aria-label": `${KINDS[model.kind] ?? model.kind} ${model.name}` });
      setText(kind, KINDS[model.kind] ?? model.kind);
      const manager = model.managed_by === "sluice" ? "Block Swap" : "ComfyUI";
      setText(about, [model.architecture ?? model.class, model.device, `managed by ${manager}`].join(" · "));
      setText(total, `${size(model.bytes.total)} of weights`);
      bytes.update(partsOf(model), model.bytes.total + model.bytes.ring);
      setText(types, typesText(model.quant_types));
      show(types, Object.keys(model.quant_types).length > 0);
      show(blocks.element, model.blocks.length > 0);
      if (model.blocks.length) blocks.update(model);
      step.update(model);
      updateSource(source, model);
      setText(inPlace, inPlaceText(model.unified_memory));
      show(inPlace, inPlace.textContent !== "");
      loras.replaceChildren(...model.loras.map(loraRow));
      show(loras, model.loras.length > 0);
      setText(patches, patchesText(model.patches));
      show(patches, patches.textContent !== "");
    },
  };
}

/** @param {Model} model @returns {import("./stacked_bar.js").Part[]} */
function partsOf(model) {
  const parts = model.bytes;
  return [
    { key: "resident", label: place(model), bytes: parts.resident },
    { key: "ring", label: "ring, on top", bytes: parts.ring },
    { key: "streamed", label: "streamed each pass", bytes: parts.streamed },
    { key: "in-ram", label: "in RAM", bytes: parts.in_ram },
    { key: "on-disk", label: "in the file only", bytes: parts.on_disk },
  ];
}

/** @param {Record<string, number>} types */
export function typesText(types) {
  const whole = Object.values(types).reduce((sum, bytes) => sum + bytes, 0);
  const sorted = Object.entries(types).sort(([, one], [, other]) => other - one);
  return sorted.map(([type, bytes]) => `${type} ${percent(bytes, whole)}`).join(", ");
}

/** @param {HTMLElement} details @param {Model} model */
function updateSource(details, model) {
  const [summary, reason, plan] = details.children;
  show(details, model.source !== null || model.plan !== null);
  const kind = model.source?.kind;
  setText(summary, kind ? `Streams from ${SOURCES[kind] ?? kind}` : "Nothing streams");
  setText(reason, model.source?.reason ?? "");
  setText(plan, model.plan?.text ?? "");
}

/** @param {import("./report.js").Lora} lora */
function loraRow(lora) {
  const about = `LoRA at ${lora.strength} · ${counted(lora.weights, "weight")} · ${size(lora.bytes)} · ${lora.way}`;
  return h("li", {}, h("span", { class: "sl-name", title: lora.name }, lora.name), h("span", {}, about));
}

/** @param {Model["unified_memory"]} unified */
function inPlaceText(unified) {
  return unified?.bytes ? `${size(unified.bytes)} used in place: ${unified.reason}` : "";
}

/** @param {Model["patches"]} patches */
function patchesText(patches) {
  const atUse = patches.at_use ? `${counted(patches.at_use, "weight")} patched at use (${size(patches.bytes)})` : "";
  const byHost = patches.by_comfyui ? `${counted(patches.by_comfyui, "weight")} patched by ComfyUI` : "";
  return [atUse, byHost].filter(Boolean).join(", ");
}
