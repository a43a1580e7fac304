// @ts-check
/**
 * Sluice's page in the settings dialog. ComfyUI keeps the values, and the server reads them when the next prompt begins
 * (nodes/settings.py).
 */

// @ts-ignore: ComfyUI serves it
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "sluice.Settings",
  settings: [
    {
      id: "sluice.weight_source",
      name: "Weight source",
      category: ["Sluice", "Streaming", "Weight source"],
      tooltip:
        "Where the weights of a model without a Block Swap Config stream from. Automatic takes the first that works: " +
        "the system's cache of the file, a copy in locked RAM, the disk.",
      type: "combo",
      defaultValue: "auto",
      options: [
        { text: "Automatic", value: "auto" },
        { text: "The file cache of the system", value: "page_cache" },
        { text: "A copy in locked RAM", value: "pinned" },
        { text: "The disk, at every step", value: "disk" },
      ],
    },
    {
      id: "sluice.reserve_gb",
      name: "VRAM to leave free (GB)",
      category: ["Sluice", "Streaming", "VRAM to leave free"],
      tooltip: "For other programs and for fragmentation, where a model has no Block Swap Config.",
      type: "number",
      defaultValue: 0.5,
      attrs: { min: 0, max: 1024, step: 0.1, minFractionDigits: 0, maxFractionDigits: 2 },
    },
    {
      id: "sluice.unified_memory",
      name: "Unified memory",
      category: ["Sluice", "Streaming", "Unified memory"],
      tooltip:
        "Whether a GPU reads weights where they lie, in the file's pages, instead of a copy. Automatic does so where " +
        "GPU and CPU share their memory. It counts for models that are loaded from then on.",
      type: "combo",
      defaultValue: "off",
      options: [
        { text: "Off", value: "off" },
        { text: "Automatic", value: "auto" },
        { text: "Wherever it is possible", value: "force" },
      ],
    },
    {
      id: "sluice.log_level",
      name: "Log",
      category: ["Sluice", "Diagnostics", "Log"],
      tooltip: "How much this pack tells in ComfyUI's log.",
      type: "combo",
      defaultValue: "info",
      options: [
        { text: "Warnings only", value: "warning" },
        { text: "Usual", value: "info" },
        { text: "Details", value: "debug" },
      ],
    },
  ],
});
