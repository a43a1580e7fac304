// @ts-check
/**
 * Numbers for people, in English as the server's own texts have them (loaders/sizes.py).
 */

import { counted, number, t } from "./words.js";

/** @type {[number, "gb" | "mb" | "kb", number][]} */
const UNITS = [
  [1e9, "gb", 2],
  [1e6, "mb", 1],
  [1e3, "kb", 1],
];

/** In the decimal unit that suits; `?` where it is not known. @param {number | null | undefined} nbytes */
export function size(nbytes) {
  if (nbytes === null || nbytes === undefined) return "?";
  for (const [unit, name, digits] of UNITS) {
    // What would be rounded up to 1000 of a unit is one of the next.
    if (nbytes >= unit - unit / 2e3) return t(name, { number: number(nbytes / unit, digits) });
  }
  return counted("bytes", nbytes);
}

/** @param {number | null | undefined} milliseconds */
export function duration(milliseconds) {
  if (milliseconds === null || milliseconds === undefined) return "?";
  const long = milliseconds >= 10_000;
  return t(long ? "seconds" : "milliseconds", { number: number(long ? milliseconds / 1e3 : milliseconds, 1) });
}

/** Never 0 % or 100 % of what is neither nothing nor all. @param {number} part @param {number} whole */
export function percent(part, whole) {
  const exact = whole > 0 ? (100 * part) / whole : 0;
  let said = String(Math.round(exact));
  if (exact > 0 && exact < 0.5) said = "<1";
  if (exact < 100 && exact >= 99.5) said = ">99";
  return t("percent", { number: said });
}

/**
 * An axis from 0 that holds `largest` in about `ticks` steps of 1, 2 or 5.
 *
 * @param {number} largest
 * @param {number} ticks
 * @returns {{top: number, ticks: number[]}}
 */
export function axis(largest, ticks) {
  const rough = Math.max(largest, 1e-9) / ticks;
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * magnitude).find((one) => one >= rough * 0.999) ?? rough;
  const count = Math.max(1, Math.ceil(largest / step - 1e-9));
  return { top: step * count, ticks: Array.from({ length: count + 1 }, (_, index) => step * index) };
}
