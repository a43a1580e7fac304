// @ts-check
/**
 * A badge on loader nodes: what the chosen files are, from their headers, before anything is loaded.
 */

// @ts-ignore: ComfyUI serves it
import { api } from "../../../scripts/api.js";
// @ts-ignore
import { app } from "../../../scripts/app.js";
import { typesText } from "./live/model_card.js";
import { size } from "./live/units.js";
import { onLanguage, t, wordsLoaded } from "./live/words.js";

/** @typedef {{folder: string, widgets: string[]}} Loader where a node's files are, and the widgets that name them */
/** @type {Record<string, Loader>} */
const LOADERS = {
  SluiceDiffusionModelLoader: { folder: "diffusion_models", widgets: ["model_name"] },
  SluiceCLIPLoader: {
    folder: "text_encoders",
    widgets: ["clip_name1", "clip_name2", "clip_name3", "clip_name4"],
  },
  SluiceLoraLoader: { folder: "loras", widgets: ["lora_name"] },
};
const NONE = ["", "none", undefined, null];
const WATCHED = "sluice_badge";
const TYPES_SHOWN = 2; // of a file with more, the others are seldom more than norms

/** @typedef {{bytes: number, architecture: string | null, quant_types: Record<string, number>}} FileFacts */

/**
 * What the server says of a file.
 *
 * @param {string} folder
 * @param {string} name
 * @returns {Promise<FileFacts>}
 */
async function factsOf(folder, name) {
  const query = new URLSearchParams({ folder, name });
  const answer = await api.fetchApi(`/sluice/file?${query}`, { cache: "no-store" });
  const facts = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(facts.error), { missing: answer.status === 404 });
  return facts;
}

/** @param {FileFacts[]} files */
function badgeText(files) {
  /** @type {Record<string, number>} */
  const types = {};
  for (const file of files) {
    for (const [type, bytes] of Object.entries(file.quant_types)) types[type] = (types[type] ?? 0) + bytes;
  }
  const shown = typesText(types).split(", ").slice(0, TYPES_SHOWN).join(", ");
  const architectures = [...new Set(files.map((file) => file.architecture?.slice(0, 40)).filter(Boolean))].join(" + ");
  const total = size(files.reduce((sum, file) => sum + file.bytes, 0));
  return [total, shown, architectures].filter(Boolean).join(" · ");
}

/** Keeps one node's badge as its widgets say. */
class FileBadge {
  /** @param {any} node @param {Loader} loader */
  constructor(node, loader) {
    this.node = node;
    this.loader = loader;
    this.asked = "";
    // @ts-ignore: litegraph's, made global by the frontend
    this.badge = watched(new window.LGraphBadge({ text: "", ...colours() }));
    node.badges.push(this.badge); // without a text it is not shown
    for (const widget of this._widgets()) this._follow(widget);
  }

  _widgets() {
    return (this.node.widgets ?? []).filter((/** @type {any} */ widget) => this.loader.widgets.includes(widget.name));
  }

  /** @param {any} widget */
  _follow(widget) {
    const before = widget.callback;
    widget.callback = (/** @type {any[]} */ ...values) => {
      const result = before?.apply(widget, values);
      void this.update();
      return result;
    };
  }

  async update() {
    await wordsLoaded();
    const names = this._widgets()
      .map((/** @type {any} */ widget) => widget.value)
      .filter((/** @type {any} */ name) => !NONE.includes(name));
    const asked = (this.asked = JSON.stringify(names));
    let text = "";
    try {
      const files = await Promise.all(names.map((/** @type {string} */ name) => factsOf(this.loader.folder, name)));
      if (files.length) text = badgeText(files);
    } catch (error) {
      text = /** @type {any} */ (error).missing ? t("badge_missing") : t("badge_unreadable");
      console.warn(`[Sluice] ${this.node.title}:`, error instanceof Error ? error.message : error);
    }
    if (this.asked === asked) this._show(text); // unless another file was chosen meanwhile
  }

  /** @param {string} text */
  _show(text) {
    Object.assign(this.badge, { text, ...colours() });
    this.node.setDirtyCanvas?.(true, true);
  }
}

/**
 * The same object, such that nodes drawn by Vue see it change: they look at a badge only once otherwise. The frontend's
 * store makes what is put into it reactive, and there is no other way to its Vue.
 *
 * @template {object} T
 * @param {T} object
 * @returns {T}
 */
function watched(object) {
  const store = app.extensionManager;
  store[WATCHED] = object;
  const proxy = store[WATCHED];
  delete store[WATCHED];
  return proxy;
}

/** As the frontend's own badges look, in the theme that is chosen. */
function colours() {
  // @ts-ignore: litegraph's, made global by the frontend
  const { BADGE_FG_COLOR: fgColor, BADGE_BG_COLOR: bgColor } = window.LiteGraph ?? {};
  return { ...(fgColor && { fgColor }), ...(bgColor && { bgColor }) };
}

/** Of a graph and of the subgraphs in it. @param {any} graph @returns {Generator<any>} */
function* everyNode(graph) {
  for (const node of graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* everyNode(node.subgraph);
  }
}

/** @type {WeakMap<any, FileBadge>} */
const badges = new WeakMap();

function updateAll() {
  for (const node of everyNode(app.graph)) void badges.get(node)?.update();
}

app.registerExtension({
  name: "sluice.FileBadges",
  setup() {
    onLanguage(updateAll);
  },
  /** @param {any} node */
  nodeCreated(node) {
    const loader = LOADERS[node.comfyClass];
    if (!loader || !node.badges) return;
    const badge = new FileBadge(node, loader);
    badges.set(node, badge);
    setTimeout(() => void badge.update()); // once a workflow that is opened has set the widgets
  },
  /** R was pressed: files may be new or others. */
  refreshComboInNodes: updateAll,
  /** A workflow was opened: its values came without the widgets' callbacks. @param {any} node */
  loadedGraphNode(node) {
    void badges.get(node)?.update();
  },
});
