// @ts-check
/**
 * Says words (`english.js`) in the language that ComfyUI's frontend is set to.
 *
 * The server gives the translations of every pack to every page. What it says in sentences of its own (reasons, plans)
 * stays English, as in its log.
 */

// @ts-ignore: ComfyUI serves it
import { api } from "../../../../scripts/api.js";
// @ts-ignore
import { app } from "../../../../scripts/app.js";
import { ENGLISH } from "./english.js";

const ROUTE = "/i18n";
const SETTING = "Comfy.Locale";
const SOURCE = "en";

/** Between the parts of a line. @type {Record<string, string>} */
const SEPARATORS = { ja: "、", zh: "，" };

/** @typedef {keyof typeof ENGLISH} Word @typedef {Record<string, string | number>} Values */

/** @type {Record<string, Record<string, string>>} by language, as the server gives them */
const translations = {};
/** @type {Record<string, string>} */
let words = {};
let language = SOURCE;
/** @type {Promise<void> | null} */
let asked = null;
/** @type {Set<() => void>} */
const followers = new Set();

/** To await before the first word. */
export function wordsLoaded() {
  return (asked ??= load());
}

async function load() {
  try {
    const answer = await api.fetchApi(ROUTE);
    if (!answer.ok) throw new Error(String(answer.status));
    for (const [name, texts] of Object.entries(await answer.json())) translations[name] = texts.sluice ?? {};
  } catch (error) {
    console.warn("[Sluice] the translations could not be read:", error);
  }
  speak(app.extensionManager.setting.get(SETTING));
  const changed = (/** @type {CustomEvent} */ event) => speak(event.detail.value);
  app.ui.settings.addEventListener(`${SETTING}.change`, changed);
}

/**
 * From now on.
 *
 * @param {string | undefined} wanted a language, or one of a country, for which the language will do
 */
export function speak(wanted) {
  const names = [wanted ?? SOURCE, (wanted ?? SOURCE).split("-")[0]];
  const next = names.find((name) => Object.keys(translations[name] ?? {}).length) ?? SOURCE;
  words = translations[next] ?? {};
  if (next === language) return;
  language = next;
  formats.clear();
  for (const follower of followers) follower();
}

/** As in the `lang` attribute. */
export function spoken() {
  return language;
}

/** Be told when the language has changed. @param {() => void} follower */
export function onLanguage(follower) {
  followers.add(follower);
}

/**
 * A text in the user's language.
 *
 * @param {Word} word
 * @param {Values} [values]
 */
export function t(word, values = {}) {
  const text = words[word] ?? ENGLISH[word];
  return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}

/** What the server calls `name`; as it is where there is no word for it. @param {string} kind @param {string} name */
export function named(kind, name) {
  const word = `${kind}_${name.replaceAll(" ", "_")}`;
  return Object.hasOwn(ENGLISH, word) ? t(/** @type {Word} */ (word)) : name;
}

/**
 * A number of things.
 *
 * @param {string} things the word without its plural
 * @param {number} count
 * @param {Values} [values]
 */
export function counted(things, count, values = {}) {
  const plural = new Intl.PluralRules(language).select(count) === "one" ? "one" : "other";
  return t(/** @type {Word} */ (`${things}_${plural}`), { count, ...values });
}

/** Parts of a line, without those that are empty. @param {string[]} parts */
export function listed(parts) {
  return parts.filter(Boolean).join(SEPARATORS[language] ?? ", ");
}

/** @type {Map<number, Intl.NumberFormat>} */
const formats = new Map();

/** With so many digits behind the point. @param {number} value @param {number} digits */
export function number(value, digits) {
  let format = formats.get(digits);
  if (!format) {
    const options = { minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: false };
    formats.set(digits, (format = new Intl.NumberFormat(language, options)));
  }
  // Rounded as the server's texts are: a format by itself takes 1.005 for what it looks like, and not for a little less.
  return format.format(Number(value.toFixed(digits)));
}

/** With as many digits as it has, of which the first six count. @param {number} value */
export function exact(value) {
  const rounded = Number(value.toPrecision(6));
  return number(rounded, String(rounded).split(".")[1]?.length ?? 0);
}
