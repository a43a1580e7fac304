// @ts-check
/**
 * A model's blocks as a map: one cell for each, filled from below by how much of it is on the device, then by what
 * streams through at each pass; the rest is where it came from. One tab stop; arrow keys walk over the blocks, and the
 * line below says what the eye may not see.
 */

import { h, setAttributes, setText } from "./dom.js";
import { duration, percent, size } from "./units.js";
import { counted, listed, t } from "./words.js";

/** @typedef {import("./report.js").Block} Block @typedef {import("./report.js").Model} Model */

let maps = 0;

const PAGE = 10; // blocks, for Page Up and Page Down

export function blockMap() {
  const id = `sluice-blocks-${++maps}`;
  const cells = h("div", { class: "sl-blocks", role: "listbox", tabindex: 0, id });
  const detail = h("p", { class: "sl-detail" });
  const element = h("div", { class: "sl-blockmap" }, cells, detail);
  /** @type {Model | null} */
  let model = null;
  let chosen = -1;

  /** @param {number} index */
  function choose(index) {
    if (!model || !model.blocks.length) return;
    chosen = Math.max(-1, Math.min(index, model.blocks.length - 1));
    [...cells.children].forEach((cell, i) => setAttributes(cell, { "aria-selected": String(i === chosen) }));
    setAttributes(cells, { "aria-activedescendant": chosen < 0 ? null : `${id}-${chosen}` });
    describe();
  }

  function describe() {
    if (!model) return;
    setText(detail, chosen >= 0 ? blockText(model, model.blocks[chosen], chosen) : summary(model));
  }

  /** @type {Record<string, (at: number, last: number) => number>} */
  const moves = {
    ArrowRight: (at) => at + 1,
    ArrowLeft: (at, last) => (at < 0 ? last : Math.max(at - 1, 0)),
    ArrowDown: (at) => at + columns(),
    ArrowUp: (at) => Math.max(at - columns(), 0),
    PageDown: (at) => at + PAGE,
    PageUp: (at) => Math.max(at - PAGE, 0),
    Home: () => 0,
    End: (_, last) => last,
    Escape: () => -1,
  };
  const columns = () => getComputedStyle(cells).gridTemplateColumns.split(" ").length;
  cells.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || (event.key === "Escape" && chosen < 0)) return;
    event.preventDefault();
    event.stopPropagation(); // arrow keys also move what is selected on the canvas
    choose(move(chosen, cells.children.length - 1));
  });
  const under = (/** @type {Event} */ event) => [...cells.children].indexOf(/** @type {Element} */ (event.target));
  cells.addEventListener("pointerover", (event) => under(event) >= 0 && choose(under(event)));
  cells.addEventListener("pointerleave", () => choose(-1));
  cells.addEventListener("blur", () => choose(-1));

  return {
    element,
    /** @param {Model} next */
    update(next) {
      model = next;
      const blocks = next.blocks;
      while (cells.children.length > blocks.length) cells.lastElementChild?.remove();
      while (cells.children.length < blocks.length) {
        cells.append(h("div", { role: "option", class: "sl-block", id: `${id}-${cells.children.length}` }));
      }
      for (const [index, block] of blocks.entries()) {
        setAttributes(cells.children[index], {
          style: fill(block),
          "data-state": state(block),
          "data-current": index === next.current_block ? "" : null,
          "aria-label": blockText(next, block, index),
        });
      }
      setAttributes(cells, { "aria-label": t("blocks_of", { model: next.name, summary: summary(next) }) });
      if (chosen >= blocks.length) choose(-1);
      describe();
    },
  };
}

/** @param {Block} block */
function fill(block) {
  const whole = Math.max(block.bytes, 1);
  const resident = (100 * (block.resident_bytes ?? 0)) / whole;
  const streamed = resident + (100 * block.streamed_bytes) / whole;
  return `--resident: ${resident.toFixed(1)}%; --streamed: ${streamed.toFixed(1)}%`;
}

/** @param {Block} block @returns {"unknown" | "resident" | "streamed" | "away"} what it mostly is */
function state(block) {
  if (block.resident_bytes === null) return "unknown";
  const away = block.bytes - block.resident_bytes - block.streamed_bytes;
  const largest = Math.max(block.resident_bytes, block.streamed_bytes, away);
  return largest === away ? "away" : largest === block.resident_bytes ? "resident" : "streamed";
}

/** @param {Model} model where what is neither resident nor streamed lies */
function home(model) {
  return t(model.bytes.on_disk > 0 ? "part_in_file" : "part_in_ram");
}

/** @param {Model} model */
export function place(model) {
  return t(model.device.startsWith("cpu") ? "place_cpu" : "place_gpu");
}

/** @param {Model} model */
function summary(model) {
  const streamed = t("state_streamed");
  const words = { resident: place(model), streamed, away: home(model), unknown: t("state_unknown") };
  const parts = Object.entries(words).map(([key, said]) => {
    const count = model.blocks.filter((block) => state(block) === key).length;
    return count ? t("blocks_in_state", { count, state: said }) : "";
  });
  return t("blocks_divided", { blocks: counted("blocks", model.blocks.length), parts: listed(parts) });
}

/** @param {Model} model @param {Block} block @param {number} index */
function blockText(model, block, index) {
  const said = [`${block.name}, ${size(block.bytes)}`];
  if (block.resident_bytes === null) said.push(t("block_moved"));
  else {
    const away = block.bytes - block.resident_bytes - block.streamed_bytes;
    const share = (/** @type {number} */ part, /** @type {string} */ state) =>
      part > 0 && said.push(t("share_in_state", { share: percent(part, block.bytes), state }));
    share(block.resident_bytes, place(model));
    share(block.streamed_bytes, t("state_streamed"));
    share(away, home(model));
  }
  if (block.compute_ms !== null) said.push(t("block_took", { time: duration(block.compute_ms) }));
  if (index === model.current_block) said.push(t("block_now"));
  return said.join("; ");
}
