// The dialogs: settings, the key, the keyboard.

import { $, h, icon, openDialog } from "./dom.js";
import { saveSettings, settings } from "./store.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }, "0 always takes the likeliest word"],
  ["topP", "Top p", { min: 0, max: 1, step: 0.01 }, "keeps the likeliest words of this share"],
  ["maxTokens", "Longest answer", { min: 1, max: 131072, step: 1 }, "in tokens", "1024"],
  ["seed", "Seed", { min: 0, max: 4294967295, step: 1 }, "the same seed, the same answer", "another each time"],
];

const SHORTCUTS = [
  ["Send", "Enter"],
  ["New line", "Shift Enter"],
  ["Stop the answer", "Esc"],
  ["Add pictures", "Alt P"],
  ["Edit the last question (in the empty box)", "↑"],
  ["From turn to turn", "Alt ↑", "Alt ↓"],
  ["On a turn: earlier or later version", "←", "→"],
  ["On a turn: edit, answer again, copy", "E", "R", "C"],
  ["New chat", "Ctrl Shift O"],
  ["Search the chats", "Ctrl K"],
  ["Show or hide the chats", "Ctrl B"],
  ["Settings", "Ctrl ,"],
  ["This list", "Ctrl /"],
];

export function applyTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

/** library: whose chats are exported, imported, deleted. changed() after each change of the chat. */
export function openSettings(chat, changed, library) {
  const form = h("form.settings", { onsubmit: (event) => event.preventDefault() });
  const section = (title, ...rows) => form.append(h("section", {}, h("h3", {}, title), ...rows));
  section("This chat", systemField(chat, changed), ...formatFields(chat, changed));
  section("Answers", h("div.pairs", {}, ...NUMBERS.map(numberField)), h("label.check", {},
    h("input", { type: "checkbox", checked: settings.logprobs,
      onchange: (event) => saveSettings({ logprobs: event.target.checked }) }),
    h("span", {}, "Show how probable each token was")));
  section("Look", choice("theme", "Colours", [["system", "As the system"], ["light", "Light"],
    ["dark", "Dark"]], settings.theme, (theme) => { saveSettings({ theme }); applyTheme(); }));
  const action = (symbol, label, run, look = "") =>
    h("button", { class: `plain ${look}`, onclick: () => { dialog.close(); run(); } }, icon(symbol), label);
  section("Your chats", h("p.hint", {}, "They are kept in this browser and nowhere else."),
    h("div.row", {}, action("down", "Export all", () => library.exportAll()),
      action("new", "Import", () => library.importAll()),
      action("trash", "Delete all", () => library.removeAll(), "danger")));
  const dialog = openDialog("Settings", form, { look: "drawer" });
}

function systemField(chat, changed) {
  const box = h("textarea", { rows: "3", id: "system", placeholder: "You answer in one short sentence.",
    oninput: () => { chat.system = box.value; changed(); } });
  box.value = chat.system;
  return h("label.field", {}, h("span", {}, "System prompt"), box);
}

function formatFields(chat, changed) {
  const problem = h("p.hint.bad", { role: "status" });
  const box = h("textarea.code-box", { rows: "7", spellcheck: "false", "aria-label": "JSON schema",
    placeholder: '{"type": "object", "properties": {"animal": {"type": "string"}}}' });
  box.value = chat.schema;
  const check = () => {
    problem.textContent = chat.format === "schema" ? schemaProblem(chat.schema) : "";
    box.hidden = chat.format !== "schema";
  };
  box.addEventListener("input", () => { chat.schema = box.value; check(); changed(); });
  const kinds = [["off", "Text"], ["json", "Any JSON"], ["schema", "JSON by schema"]];
  const kind = choice("format", "Form of the answers", kinds, chat.format, (value) => {
    chat.format = value;
    check();
    changed();
    if (value === "schema") box.focus();
  });
  check();
  return [kind, box, problem];
}

/** Why a schema cannot be sent; "" if it can. */
export function schemaProblem(text) {
  if (!text.trim()) return "Write a schema, or choose another form.";
  try {
    const schema = JSON.parse(text);
    const isObject = schema && typeof schema === "object" && !Array.isArray(schema);
    return isObject ? "" : "A schema is a JSON object.";
  } catch (error) {
    return `This is no JSON yet: ${error.message}`;
  }
}

function numberField([name, label, limits, hint, unset = "model's own"]) {
  const input = h("input", { type: "number", placeholder: unset, inputmode: "decimal",
    ...Object.fromEntries(Object.entries(limits).map(([key, value]) => [key, String(value)])),
    oninput: () => input.validity.valid && saveSettings({ [name]: input.value }) });
  input.value = settings[name];
  return h("label.field", {}, h("span", {}, label), input, h("small", {}, hint));
}

function choice(name, legend, options, value, change) {
  return h("fieldset.choice", {}, h("legend", {}, legend), ...options.map(([key, label]) =>
    h("label", {}, h("input", { type: "radio", name, value: key, checked: key === value,
      onchange: () => change(key) }), h("span", {}, label))));
}

/** Resolves to {key, inThisTab}, or null where the reader does not want to. */
export function askKey(isWrong) {
  if ($("key")) return Promise.resolve(null);
  return new Promise((resolve) => {
    const input = h("input", { id: "key", type: "password", autocomplete: "off", required: true });
    const keep = h("input", { type: "checkbox" });
    let given = null;
    const said = isWrong ? "The server does not take this key." : "This server asks for a key.";
    const form = h("form", { onsubmit: (event) => {
      event.preventDefault();
      given = { key: input.value.trim(), inThisTab: keep.checked };
      dialog.close();
    } }, h("p", {}, `${said} Whoever started it has one.`),
    h("label.field", {}, h("span", {}, "Key"), input),
    h("label.check", {}, keep, h("span", {}, "Remember it until this tab is closed")),
    h("div.row", {}, h("button.primary", { type: "submit" }, "Use this key")));
    const dialog = openDialog("A key, please", form, { look: "small" });
    dialog.addEventListener("close", () => resolve(given));
    input.focus();
  });
}

/** Resolves to the new text, or null. */
export function askText(title, label, value) {
  return new Promise((resolve) => {
    const input = h("input", { type: "text", maxlength: "200" });
    input.value = value;
    let given = null;
    const form = h("form", { onsubmit: (event) => {
      event.preventDefault();
      given = input.value.trim();
      dialog.close();
    } }, h("label.field", {}, h("span", {}, label), input),
    h("div.row", {}, h("button.primary", { type: "submit" }, "Save")));
    const dialog = openDialog(title, form, { look: "small" });
    dialog.addEventListener("close", () => resolve(given));
    input.select();
  });
}

export function openShortcuts() {
  const isMac = /Mac|iPhone|iPad/.test(navigator.platform);
  const named = (key) => (isMac ? key.replace("Ctrl", "⌘").replace("Alt", "⌥") : key);
  const keys = (list) => list.flatMap((press) => [h("kbd", {}, named(press)), " "]);
  openDialog("Keyboard", h("dl.shortcuts", {}, ...SHORTCUTS.map(([what, ...presses]) =>
    h("div", {}, h("dt", {}, what), h("dd", {}, ...keys(presses))))), { look: "small" });
}
