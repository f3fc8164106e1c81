// A chat is a tree: an edited question or a second answer is a sibling of the first. `chosen` maps a
// parent to the child that is shown, so every branch stays and is where it was left.

import { newId, tameName } from "./dom.js";

const ROOT = "root";
const LONGEST_TITLE = 60;

export function newChat() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system: "", format: "off", schema: "",
    nodes: {}, chosen: {} };
}

/** Appends a node under `parent` (null: a first question) and shows it. */
export function add(chat, parent, role, fields = {}) {
  const node = { id: newId(), parent: parent ?? ROOT, role, text: "", pictures: [],
    created: Date.now(), ...fields };
  chat.nodes[node.id] = node;
  chat.chosen[node.parent] = node.id;
  chat.updated = Date.now();
  if (!chat.title && role === "user") chat.title = titleOf(node);
  return node;
}

function titleOf(node) {
  const line = node.text.trim().replace(/\s+/g, " ");
  if (!line) return "A picture";
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1).trimEnd()}…` : line;
}

export function children(chat, parent) {
  return Object.values(chat.nodes)
    .filter((node) => node.parent === (parent ?? ROOT))
    .sort((a, b) => a.created - b.created);
}

/** The nodes that are shown, from the first question on. */
export function path(chat) {
  const shown = [];
  let node = chat.nodes[chat.chosen[ROOT]];
  while (node && !shown.includes(node)) {
    shown.push(node);
    node = chat.nodes[chat.chosen[node.id]];
  }
  return shown;
}

/** The nodes from the first question down to `node`. */
export function lineage(chat, node) {
  const nodes = [];
  for (let at = node; at && !nodes.includes(at); at = chat.nodes[at.parent]) nodes.unshift(at);
  return nodes;
}

/** [how many siblings with itself, its place among them]. */
export function place(chat, node) {
  const siblings = children(chat, node.parent);
  return [siblings.length, siblings.indexOf(node)];
}

/** Shows the sibling `step` further on. */
export function turn(chat, node, step) {
  const siblings = children(chat, node.parent);
  const next = siblings[siblings.indexOf(node) + step];
  if (next) chat.chosen[node.parent] = next.id;
  return next ?? null;
}

export const lastNode = (chat) => path(chat).at(-1) ?? null;
export const pictureIds = (chat) => Object.values(chat.nodes).flatMap((node) => node.pictures);

export function matches(chat, words) {
  const texts = [chat.title, ...Object.values(chat.nodes).map((node) => node.text)];
  const text = texts.join("\n").toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

/** An answer that was being written when the page went away ends where it was. */
export function settle(chat) {
  for (const node of Object.values(chat.nodes)) {
    if (node.state === "answering") {
      node.state = "stopped";
      node.note = "The page was closed while this was being written.";
    }
  }
  return chat;
}

/** A chat out of a foreign file, or null: known fields of known types, under new names. */
export function adopt(given, newPicture) {
  if (!given || typeof given !== "object" || typeof given.nodes !== "object") return null;
  const text = (value) => (typeof value === "string" ? value : "");
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  const chat = { ...newChat(), title: text(given.title).slice(0, 200), system: text(given.system),
    schema: text(given.schema), created: time(given.created), updated: time(given.updated) };
  if (["off", "json", "schema"].includes(given.format)) chat.format = given.format;
  const names = new Map([[ROOT, ROOT]]);
  for (const id of Object.keys(given.nodes ?? {})) names.set(id, newId());
  for (const [id, node] of Object.entries(given.nodes ?? {})) {
    const isKnown = ["user", "assistant"].includes(node?.role) && names.has(node.parent);
    if (!isKnown) continue;
    const pictures = Array.isArray(node.pictures) ? node.pictures : [];
    const made = { id: names.get(id), parent: names.get(node.parent), role: node.role,
      text: text(node.text), created: time(node.created),
      pictures: pictures.map(newPicture).filter(Boolean) };
    if (node.role === "assistant") {
      Object.assign(made, { state: "done", model: tameName(text(node.model) || "model"),
        isJson: node.isJson === true });
    }
    chat.nodes[made.id] = made;
  }
  for (const [parent, child] of Object.entries(given.chosen ?? {})) {
    const known = chat.nodes[names.get(child)];
    if (known && known.parent === names.get(parent)) chat.chosen[known.parent] = known.id;
  }
  for (const node of Object.values(chat.nodes)) chat.chosen[node.parent] ??= node.id;
  return chat;
}
