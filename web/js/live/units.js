// @ts-check
/**
 * Numbers for people, as the server's own texts have them (loaders/sizes.py).
 */

/** @type {[number, string, number][]} */
const UNITS = [
  [1e9, "GB", 2],
  [1e6, "MB", 1],
  [1e3, "kB", 1],
];

/** In the decimal unit that suits; `?` where it is not known. @param {number | null | undefined} nbytes */
export function size(nbytes) {
  if (nbytes === null || nbytes === undefined) return "?";
  for (const [unit, name, digits] of UNITS) {
    // What would be rounded up to 1000 of a unit is one of the next.
    if (nbytes >= unit - unit / 2e3) return `${(nbytes / unit).toFixed(digits)} ${name}`;
  }
  return counted(nbytes, "byte");
}

/** @param {number | null | undefined} milliseconds */
export function duration(milliseconds) {
  if (milliseconds === null || milliseconds === undefined) return "?";
  return milliseconds >= 10_000 ? `${(milliseconds / 1e3).toFixed(1)} s` : `${milliseconds.toFixed(1)} ms`;
}

/** Never 0 % or 100 % of what is neither nothing nor all. @param {number} part @param {number} whole */
export function percent(part, whole) {
  if (whole <= 0) return "0 %";
  const exact = (100 * part) / whole;
  if (exact > 0 && exact < 0.5) return "<1 %";
  if (exact < 100 && exact >= 99.5) return ">99 %";
  return `${Math.round(exact)} %`;
}

/** @param {number} count @param {string} one @param {string} [many] */
export function counted(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
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
