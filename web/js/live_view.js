// @ts-check
/**
 * The sidebar tab "Sluice": where every byte is, while it happens.
 */

// @ts-ignore: ComfyUI serves it
import { app } from "../../../scripts/app.js";
import { mountPanel } from "./live/panel.js";

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

app.registerExtension({
  name: "sluice.LiveView",
  setup() {
    if (!document.querySelector(`link[href="${STYLE}"]`)) {
      document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: STYLE }));
    }
    app.extensionManager.registerSidebarTab({
      id: "sluice",
      icon: "pi pi-chart-bar",
      title: "Sluice",
      tooltip: "Sluice: where the models' bytes are",
      type: "custom",
      render,
      destroy,
    });
  },
});
