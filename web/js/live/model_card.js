// @ts-check
/**
 * One loaded model: what it is, where its bytes are, its blocks, what a pass costs, its LoRAs.
 */

import { blockMap, place } from "./block_map.js";
import { h, setAttributes, setText, show } from "./dom.js";
import { stackedBar } from "./stacked_bar.js";
import { stepTimes } from "./step_times.js";
import { percent, size } from "./units.js";
import { counted, exact, listed, named, t } from "./words.js";

/** @typedef {import("./report.js").Model} Model */

export function modelCard() {
  const name = h("h3", {});
  const kind = h("span", { class: "sl-chip" });
  const about = h("p", { class: "sl-note" });
  const total = h("p", { class: "sl-total" });
  const bytes = stackedBar(t("weights_where"));
  const types = h("p", { class: "sl-note" });
  const blocks = blockMap();
  const step = stepTimes();
  const told = { class: "sl-note", lang: "en" }; // in the server's own words
  const source = h("details", {}, h("summary", {}), h("p", told), h("p", told));
  const loras = h("ul", { class: "sl-list sl-loras", "aria-label": t("loras") });
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
      setAttributes(element, { "aria-label": `${named("kind", model.kind)} ${model.name}` });
      setText(kind, named("kind", model.kind));
      const manager = model.managed_by === "sluice" ? "Block Swap" : "ComfyUI";
      setText(about, [model.architecture ?? model.class, model.device, t("managed_by", { manager })].join(" · "));
      setText(total, t("weights_total", { size: size(model.bytes.total) }));
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
    { key: "ring", label: t("part_ring"), bytes: parts.ring },
    { key: "streamed", label: t("part_streamed"), bytes: parts.streamed },
    { key: "in-ram", label: t("part_in_ram"), bytes: parts.in_ram },
    { key: "on-disk", label: t("part_in_file"), bytes: parts.on_disk },
  ];
}

/** @param {Record<string, number>} types */
export function typesText(types) {
  const whole = Object.values(types).reduce((sum, bytes) => sum + bytes, 0);
  const sorted = Object.entries(types).sort(([, one], [, other]) => other - one);
  return listed(sorted.map(([type, bytes]) => `${type} ${percent(bytes, whole)}`));
}

/** @param {HTMLElement} details @param {Model} model */
function updateSource(details, model) {
  const [summary, reason, plan] = details.children;
  show(details, model.source !== null || model.plan !== null);
  const kind = model.source?.kind;
  setText(summary, kind ? named("streams", kind) : t("streams_nothing"));
  setText(reason, model.source?.reason ?? "");
  setText(plan, model.plan?.text ?? "");
}

/** @param {import("./report.js").Lora} lora */
function loraRow(lora) {
  const strength = t("lora_strength", { strength: exact(lora.strength) });
  const about = [strength, counted("weights", lora.weights), size(lora.bytes), lora.way].join(" · ");
  return h("li", {}, h("span", { class: "sl-name", title: lora.name }, lora.name), h("span", {}, about));
}

/** @param {Model["unified_memory"]} unified */
function inPlaceText(unified) {
  return unified?.bytes ? t("in_place", { size: size(unified.bytes), reason: unified.reason }) : "";
}

/** @param {Model["patches"]} patches */
function patchesText(patches) {
  const atUse = patches.at_use ? counted("patched_at_use", patches.at_use, { size: size(patches.bytes) }) : "";
  return listed([atUse, patches.by_comfyui ? counted("patched_by_comfyui", patches.by_comfyui) : ""]);
}
