// @ts-check
/**
 * VRAM and RAM over the time of the prompt, with its stages above. Arrow keys, or the pointer, move a cursor that says
 * what it was at that time; for a screen reader it is a slider.
 */

import { h, setAttributes, setText, show, svg } from "./dom.js";
import { axis, size } from "./units.js";
import { exact, listed, named, number, t } from "./words.js";

/** @typedef {import("./report.js").Timeline} TimelineData */

const HEIGHT = 176;
const MARGIN = { left: 48, right: 8, top: 24, bottom: 20 };
const LETTER = 6.4; // width of one, about, to know what fits
const WIDE = /[\u1100-\uffef]/g; // letters that take the room of two
const SERIES = ["vram_used", "vram_allocated", "ram_anonymous", "ram_file"];

export function timeline() {
  const empty = h("p", { class: "sl-empty" }, t("timeline_empty"));
  const chart = svg("svg", { class: "sl-chart", "aria-hidden": "true", height: HEIGHT });
  const slider = h("div", { role: "slider", tabindex: 0, "aria-label": t("timeline_cursor") }, chart);
  const legend = h("dl", { class: "sl-parts sl-legend" });
  const readout = h("p", { class: "sl-detail" });
  const element = h("div", {}, empty, slider, readout, legend);
  /** @type {TimelineData | null} */
  let data = null;
  let cursor = -1; // index of a sample
  let drawn = "";

  function draw() {
    if (!data || !data.samples.length) return;
    const width = Math.max(chart.clientWidth || element.clientWidth, 160);
    const state = JSON.stringify([width, cursor, data.prompt_id, data.samples.length, data.samples.at(-1), data.marks]);
    if (state === drawn) return;
    drawn = state;
    const scale = scaleOf(data, width);
    setAttributes(chart, { viewBox: `0 0 ${width} ${HEIGHT}` });
    chart.replaceChildren(...grid(scale), ...stages(data, scale), ...lines(data, scale), ...cursorLine());
    legend.replaceChildren(...legendRows(data, cursor));
    setText(readout, cursor < 0 ? t("timeline_peak") : timeText(data, cursor));
    const at = cursor < 0 ? data.samples.length - 1 : cursor;
    setAttributes(slider, {
      "aria-valuemin": 0,
      "aria-valuemax": data.samples.length - 1,
      "aria-valuenow": at,
      "aria-valuetext": sampleText(data, at),
    });

    function cursorLine() {
      if (!data || cursor < 0) return [];
      const x = scale.x(data.samples[cursor][0] ?? 0);
      return [svg("line", { class: "sl-cursor", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom })];
    }
  }

  /** @param {number} index */
  function move(index) {
    if (!data) return;
    cursor = Math.max(-1, Math.min(index, data.samples.length - 1));
    draw();
  }

  /** @type {Record<string, (at: number, last: number) => number>} */
  const moves = {
    ArrowRight: (at) => at + 1,
    ArrowUp: (at) => at + 1,
    ArrowLeft: (at) => Math.max(at - 1, 0),
    ArrowDown: (at) => Math.max(at - 1, 0),
    PageUp: (at, last) => at + Math.ceil(last / 10),
    PageDown: (at, last) => Math.max(at - Math.ceil(last / 10), 0),
    Home: () => 0,
    End: (_, last) => last,
  };
  slider.addEventListener("keydown", (event) => {
    const last = (data?.samples.length ?? 0) - 1;
    const to = moves[event.key];
    if (!to || last < 0) return;
    event.preventDefault();
    event.stopPropagation();
    move(to(cursor < 0 ? last : cursor, last));
  });
  slider.addEventListener("blur", () => move(-1));
  slider.addEventListener("pointerleave", () => move(-1));
  slider.addEventListener("pointermove", (event) => {
    if (!data?.samples.length) return;
    const box = chart.getBoundingClientRect();
    const ms = scaleOf(data, box.width).time(event.clientX - box.left);
    const after = data.samples.findIndex((sample) => (sample[0] ?? 0) >= ms);
    move(after < 0 ? data.samples.length - 1 : after);
  });

  return {
    element,
    redraw: draw,
    /** @param {TimelineData} next */
    update(next) {
      if (data?.prompt_id !== next.prompt_id) cursor = -1;
      data = next;
      cursor = Math.min(cursor, next.samples.length - 1);
      const some = next.samples.length > 0;
      show(empty, !some);
      for (const part of [slider, legend, readout]) show(part, some);
      draw();
    },
  };
}

/**
 * @param {TimelineData} data
 * @param {number} width
 */
function scaleOf(data, width) {
  const end = Math.max(data.samples.at(-1)?.[0] ?? 0, ...data.marks.map((mark) => mark.ms), 100);
  const largest = Math.max(...seriesOf(data).flatMap(({ values }) => values.map((value) => value ?? 0)), 1);
  const unit = largest >= 1e9 ? 1e9 : 1e6;
  const vertical = axis(largest / unit, 4);
  const inner = width - MARGIN.left - MARGIN.right;
  const tall = HEIGHT - MARGIN.top - MARGIN.bottom;
  return {
    end,
    width,
    unit,
    unitName: /** @type {"gb" | "mb"} */ (unit === 1e9 ? "gb" : "mb"),
    vertical,
    x: (/** @type {number} */ ms) => MARGIN.left + (inner * ms) / end,
    y: (/** @type {number} */ bytes) => HEIGHT - MARGIN.bottom - (tall * bytes) / unit / vertical.top,
    time: (/** @type {number} */ x) => ((x - MARGIN.left) / inner) * end,
  };
}

/** @param {TimelineData} data the columns that this system knows */
function seriesOf(data) {
  const all = SERIES.map((name) => {
    const column = data.columns.indexOf(name);
    return { name, values: data.samples.map((sample) => sample[column] ?? null) };
  });
  return all.filter(({ values }) => values.some((value) => value !== null));
}

/** @param {ReturnType<typeof scaleOf>} scale */
function grid(scale) {
  const seconds = axis(scale.end / 1e3, Math.max(2, Math.floor(scale.width / 70)));
  const rows = scale.vertical.ticks.flatMap((tick, index) => {
    const y = scale.y(tick * scale.unit);
    const said = index === scale.vertical.ticks.length - 1 ? t(scale.unitName, { number: exact(tick) }) : exact(tick);
    return [
      svg("line", { class: "sl-grid", x1: MARGIN.left, x2: scale.width - MARGIN.right, y1: y, y2: y }),
      svg("text", { class: "sl-tick", x: MARGIN.left - 5, y: y + 3.5, "text-anchor": "end" }, said),
    ];
  });
  const columns = seconds.ticks.filter((tick) => tick * 1e3 <= scale.end).map((tick, index, ticks) => {
    const x = Math.min(scale.x(tick * 1e3), scale.width - MARGIN.right - 8);
    const said = index === ticks.length - 1 ? t("seconds", { number: exact(tick) }) : exact(tick);
    return svg("text", { class: "sl-tick", x, y: HEIGHT - 5, "text-anchor": "middle" }, said);
  });
  return [...rows, ...columns];
}

/**
 * Bands above the plot, and a line where each stage begins.
 *
 * @param {TimelineData} data
 * @param {ReturnType<typeof scaleOf>} scale
 */
function stages(data, scale) {
  const begun = data.marks.filter((mark) => mark.stage !== null);
  return begun.flatMap((mark, index) => {
    const stage = mark.stage ?? "";
    const name = named("stage", stage);
    const [left, right] = [scale.x(mark.ms), scale.x(begun[index + 1]?.ms ?? scale.end)];
    const width = Math.max(right - left - 1, 1);
    const band = { class: `sl-stage sl-stage-${stage}`, x: left, y: 2, width, height: 16, rx: 3 };
    const parts = [
      svg("rect", band, svg("title", {}, name)),
      svg("line", { class: "sl-stage-line", x1: left, x2: left, y1: MARGIN.top - 6, y2: HEIGHT - MARGIN.bottom }),
    ];
    if (width > (name.length + (name.match(WIDE) ?? []).length) * LETTER) {
      parts.push(svg("text", { class: "sl-stage-name", x: left + width / 2, y: 14, "text-anchor": "middle" }, name));
    }
    return parts;
  });
}

/** @param {TimelineData} data @param {ReturnType<typeof scaleOf>} scale */
function lines(data, scale) {
  const floor = scale.y(0);
  return seriesOf(data).reverse().flatMap(({ name, values }) => {
    const points = values.flatMap((value, index) =>
      value === null ? [] : [`${scale.x(data.samples[index][0] ?? 0).toFixed(1)},${scale.y(value).toFixed(1)}`],
    );
    const [first, last] = [points[0].split(",")[0], points[points.length - 1].split(",")[0]];
    const area = `${first},${floor} ${points.join(" ")} ${last},${floor}`;
    return [
      svg("polygon", { class: `sl-area sl-line-${name}`, points: area }),
      svg("polyline", { class: `sl-line sl-line-${name}`, points: points.join(" ") }),
    ];
  });
}

/** @param {TimelineData} data @param {number} cursor a sample; the most of each column where there is none */
function legendRows(data, cursor) {
  return seriesOf(data).map(({ name, values }) => {
    const swatch = h("span", { class: `sl-swatch sl-swatch-${name}`, "aria-hidden": "true" });
    const value = cursor < 0 ? data.peak[name] : values[cursor];
    return h("div", {}, swatch, h("dt", {}, named("series", name)), h("dd", {}, size(value)));
  });
}

/** @param {TimelineData} data @param {number} index */
function timeText(data, index) {
  const ms = data.samples[index][0] ?? 0;
  const begun = data.marks.filter((mark) => mark.stage !== null && mark.ms <= ms);
  const at = t("timeline_at", { time: t("seconds", { number: number(ms / 1e3, 1) }) });
  return listed([at, begun.length ? named("stage", begun[begun.length - 1].stage ?? "") : ""]);
}

/** @param {TimelineData} data @param {number} index */
function sampleText(data, index) {
  const values = seriesOf(data).map(({ name, values: all }) => `${named("series", name)} ${size(all[index])}`);
  return `${timeText(data, index)}: ${listed(values)}`;
}
