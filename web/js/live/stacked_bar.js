// @ts-check
/**
 * A bar of parts and, below it, what each part is: the same numbers for the eye and for a screen reader.
 */

import { h, setAttributes, setText, show } from "./dom.js";
import { size } from "./units.js";

/**
 * @typedef {{key: string, label: string, bytes: number, quiet?: boolean}} Part `key` chooses the colour; a quiet part
 *   is what is left over, and is listed but not drawn
 */

/** @param {string} label of the whole, for a screen reader */
export function stackedBar(label) {
  const bar = h("div", { class: "sl-bar", "aria-hidden": "true" });
  const list = h("dl", { class: "sl-parts" });
  const element = h("div", { role: "group", "aria-label": label }, bar, list);
  /** @type {Map<string, {segment: HTMLElement, row: HTMLElement, term: HTMLElement, value: HTMLElement}>} */
  const known = new Map();

  /** @param {Part} part */
  function rowOf(part) {
    const found = known.get(part.key);
    if (found) return found;
    const segment = h("span", { class: `sl-segment sl-is-${part.key}` });
    const term = h("dt", {});
    const value = h("dd", {});
    const swatch = h("span", { class: `sl-swatch sl-is-${part.key}`, "aria-hidden": "true" });
    const row = h("div", {}, swatch, term, value);
    const made = { segment, row, term, value };
    known.set(part.key, made);
    bar.append(segment);
    list.append(row);
    return made;
  }

  return {
    element,
    /** @param {Part[]} parts those of 0 bytes are left out @param {number} total */
    update(parts, total) {
      for (const part of parts) {
        const { segment, row, term, value } = rowOf(part);
        setText(term, part.label);
        setText(value, size(part.bytes));
        show(row, part.bytes > 0);
        show(segment, part.bytes > 0 && !part.quiet);
        setAttributes(segment, { style: `flex-basis: ${(100 * part.bytes) / Math.max(total, 1)}%` });
      }
    },
  };
}
