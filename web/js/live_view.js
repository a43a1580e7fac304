// @ts-check
/**
 * The sidebar tab "Sluice": where every byte is, while it happens.
 */

// @ts-ignore: ComfyUI serves it
import { app } from "../../../scripts/app.js";
import { mountPanel } from "./live/panel.js";
import { onLanguage, t, wordsLoaded } from "./live/words.js";

const ID = "sluice";
const STYLE = new URL("../css/live_view.css", import.meta.url).href;

/** @type {{element: HTMLElement, end: () => void} | null} */
let mounted = null;

/**
 * ComfyUI calls this when the tab opens, and again with the same element whenever it draws the sidebar anew.
 *
 * @param {HTMLElement} element
 */
function render(element) {
  if (mounted?.element === element && element.childElementCount) return;
  mounted?.end();
  mounted = { element, end: mountPanel(element) };
}

function destroy() {
  mounted?.end();
  mounted = null;
}

/** In the language that is spoken from now on. */
function renew() {
  const tabs = app.extensionManager.getSidebarTabs();
  const tab = tabs.find((/** @type {{id: string}} */ one) => one.id === ID);
  if (tab) tab.tooltip = t("tab_tooltip");
  const element = mounted?.element;
  destroy();
  if (element) render(element);
}

app.registerExtension({
  name: "sluice.LiveView",
  async setup() {
    if (!document.querySelector(`link[href="${STYLE}"]`)) {
      document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: STYLE }));
    }
    await wordsLoaded();
    app.extensionManager.registerSidebarTab({
      id: ID,
      icon: "pi pi-chart-bar",
      title: "Sluice",
      tooltip: t("tab_tooltip"),
      type: "custom",
      render,
      destroy,
    });
    onLanguage(renew);
  },
});
