// Elements, icons and messages to the reader. Text only ever becomes a text node: the page runs under
// `require-trusted-types-for 'script'; trusted-types 'none'`, so nothing here could parse HTML.

const SVG = "http://www.w3.org/2000/svg";

// Strokes on a field of 20 × 20.
const ICONS = {
  back: "M12 5l-5 5 5 5",
  camera:
    "M3 7.6A1.6 1.6 0 0 1 4.6 6h1.7l1-1.5a1.1 1.1 0 0 1 .9-.5h3.6a1.1 1.1 0 0 1 .9.5l1 1.5h1.7A1.6 1.6 0 0 1 17 7.6v6.8a1.6 1.6 0 0 1-1.6 1.6H4.6A1.6 1.6 0 0 1 3 14.4zM10 13.4a2.7 2.7 0 1 0 0-5.4 2.7 2.7 0 0 0 0 5.4z",
  check: "M4.5 10.5l3.6 3.6 7.4-8.1",
  close: "M5.5 5.5l9 9M14.5 5.5l-9 9",
  copy: "M8.4 7h6.2A1.4 1.4 0 0 1 16 8.4v6.2a1.4 1.4 0 0 1-1.4 1.4H8.4A1.4 1.4 0 0 1 7 14.6V8.4A1.4 1.4 0 0 1 8.4 7zM13 4.6A1 1 0 0 0 12 4H5.4A1.4 1.4 0 0 0 4 5.4V12a1 1 0 0 0 .6 1",
  down: "M10 4.5v11M5.2 10.8L10 15.6l4.8-4.8",
  edit: "M12.4 4.6l3 3L7.2 15.8 3.8 16.2l.4-3.4zM10.8 6.2l3 3",
  eye: "M2.6 10S5.2 5 10 5s7.4 5 7.4 5-2.6 5-7.4 5-7.4-5-7.4-5zM10 12.2a2.2 2.2 0 1 0 0-4.4 2.2 2.2 0 0 0 0 4.4z",
  forward: "M8 5l5 5-5 5",
  grid: "M5.4 4h9.2A1.4 1.4 0 0 1 16 5.4v9.2a1.4 1.4 0 0 1-1.4 1.4H5.4A1.4 1.4 0 0 1 4 14.6V5.4A1.4 1.4 0 0 1 5.4 4zM10 4v12M4 10h12",
  keyboard:
    "M4 5.5h12A1.5 1.5 0 0 1 17.5 7v6a1.5 1.5 0 0 1-1.5 1.5H4A1.5 1.5 0 0 1 2.5 13V7A1.5 1.5 0 0 1 4 5.5zM5.8 8.5h.01M8.6 8.5h.01M11.4 8.5h.01M14.2 8.5h.01M7 11.5h6",
  more: "M5 10h.01M10 10h.01M15 10h.01",
  new: "M10 4.5v11M4.5 10h11",
  picture:
    "M5.4 3.6h9.2a1.8 1.8 0 0 1 1.8 1.8v9.2a1.8 1.8 0 0 1-1.8 1.8H5.4a1.8 1.8 0 0 1-1.8-1.8V5.4a1.8 1.8 0 0 1 1.8-1.8zM4 14.2l3.4-3.4a1.2 1.2 0 0 1 1.7 0l5.3 5.3M13 8a.9.9 0 1 0-1.8 0A.9.9 0 0 0 13 8z",
  retry: "M15.7 8A6 6 0 1 0 16 10.8M16.2 4v4.1h-4.1",
  search: "M9 14.2A5.2 5.2 0 1 0 9 3.8a5.2 5.2 0 0 0 0 10.4zM12.8 12.8l3.7 3.7",
  send: "M10 15.8V4.6M5.2 9.2L10 4.4l4.8 4.8",
  settings:
    "M3.5 6.5h6.6M14.4 6.5h2.1M12.2 8.6a2.1 2.1 0 1 0 0-4.2 2.1 2.1 0 0 0 0 4.2zM3.5 13.5h2.1M9.9 13.5h6.6M7.8 15.6a2.1 2.1 0 1 0 0-4.2 2.1 2.1 0 0 0 0 4.2z",
  sidebar: "M5 4h10a1.6 1.6 0 0 1 1.6 1.6v8.8A1.6 1.6 0 0 1 15 16H5a1.6 1.6 0 0 1-1.6-1.6V5.6A1.6 1.6 0 0 1 5 4zM8 4v12",
  stop: "M7 5.8h6A1.2 1.2 0 0 1 14.2 7v6a1.2 1.2 0 0 1-1.2 1.2H7A1.2 1.2 0 0 1 5.8 13V7A1.2 1.2 0 0 1 7 5.8z",
  swap: "M4 7.5h11M12 4.5l3 3-3 3M16 12.5H5M8 9.5l-3 3 3 3",
  trash: "M4 6h12M8 6V4.2h4V6M5.6 6l.7 9a1.2 1.2 0 0 0 1.2 1h5a1.2 1.2 0 0 0 1.2-1l.7-9",
};

/** h("button.quiet.round", {onclick, "aria-label": "Send"}, child, "text"): an element. */
export function h(name, given = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && typeof value !== "string") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  if (tag === "button" && !given.type) element.type = "button";
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that is an icon alone: its label is read aloud and shown as a tip. */
export function iconButton(name, label, onclick, given = {}) {
  const look = given.class ?? "";
  return h("button", { ...given, class: `icon-button ${look}`.trim(), "aria-label": label,
    title: label, onclick }, icon(name));
}

export const $ = (id) => document.getElementById(id);

const LONGEST_LOG = 12;

/** Reads `text` aloud when the reader is free. */
export function announce(text) {
  const log = $("announcer");
  log.append(h("p", {}, text));
  while (log.childElementCount > LONGEST_LOG) log.firstElementChild.remove();
}

/** A passing message, with one thing that can be done about it. */
export function toast(text, label, act, { seconds = 8 } = {}) {
  const box = h("div.toast", {}, h("span", {}, text));
  const close = () => box.remove();
  if (label) box.append(h("button.link", { onclick: () => { close(); act(); } }, label));
  $("toasts").replaceChildren(box);
  announce(text);
  setTimeout(close, seconds * 1000);
}

/** Opens a <dialog> that goes for good when it is closed. */
export function openDialog(title, content, { look = "" } = {}) {
  const heading = h("h2", { id: "dialog-title" }, title);
  const dialog = h("dialog", { class: look, "aria-labelledby": "dialog-title" });
  const close = () => dialog.close();
  dialog.append(h("header", {}, heading, iconButton("close", "Close", close)), content);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Opens a small menu under `anchor`; choices: [label, act, icon?] each. */
export function openMenu(anchor, choices) {
  const menu = h("div.menu", { popover: "auto", role: "menu" });
  for (const [label, act, symbol, look] of choices) {
    const run = () => { menu.hidePopover(); act(); };
    menu.append(h("button", { role: "menuitem", class: look ?? "", onclick: run },
      symbol ? icon(symbol) : null, label));
  }
  const items = [...menu.children];
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = items.indexOf(document.activeElement);
    items[(at + step + items.length) % items.length].focus();
  });
  menu.addEventListener("toggle", (event) => {
    if (event.newState !== "closed") return;
    menu.remove();
    anchor.setAttribute("aria-expanded", "false");
  });
  document.body.append(menu);
  menu.showPopover();
  const at = anchor.getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - menu.offsetWidth - 8);
  const below = at.bottom + 6 + menu.offsetHeight < innerHeight;
  menu.style.left = `${Math.max(8, left)}px`;
  menu.style.top = `${below ? at.bottom + 6 : at.top - 6 - menu.offsetHeight}px`;
  anchor.setAttribute("aria-expanded", "true");
  items[0].focus();
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
    return true;
  } catch {
    toast("The browser lets a page copy on https and on localhost only.");
    return false;
  }
}

export const number = (value) => Math.round(value).toLocaleString("en-US");
export const counted = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
export const newId = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(16))]
  .map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** A foreign name on one line: no control characters, no marks that turn the direction of text. */
export const tameName = (name) =>
  String(name).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "").slice(0, 120) || "picture";
