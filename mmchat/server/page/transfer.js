// Chats as files: JSON with their pictures, to be read again; Markdown, to be read by people.

import { adopt, path, pictureIds } from "./chat.js";
import { h, newId, tameName } from "./dom.js";
import * as pictures from "./pictures.js";
import * as store from "./store.js";

const KIND = "mmchat chats";
const VERSION = 1;
const DATA = /^data:(image\/[\w.+-]+)?[^,]*;base64,/;

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const fileName = (chat, ending) => {
  const words = (chat.title || "chat").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
  return `${words.replace(/^-|-$/g, "").slice(0, 50) || "chat"}.${ending}`;
};

export async function asJson(chats) {
  const kept = [];
  for (const id of new Set(chats.flatMap(pictureIds))) {
    const picture = await pictures.find(id);
    if (picture) kept.push({ id, name: picture.name, data: await pictures.dataUrl(picture.blob) });
  }
  return JSON.stringify({ kind: KIND, version: VERSION, chats, pictures: kept }, null, 1);
}

/** The shown branch, as people would write it down. */
export async function asMarkdown(chat) {
  const parts = [`# ${chat.title || "Chat"}`];
  if (chat.system.trim()) parts.push(`*System prompt:* ${chat.system.trim()}`);
  for (const node of path(chat)) {
    parts.push(node.role === "user" ? "## You" : `## ${node.model ?? "Answer"}`);
    for (const id of node.pictures ?? []) {
      const picture = await pictures.find(id);
      parts.push(`*Picture: ${picture?.name ?? "gone"}*`);
    }
    if (node.text) parts.push(node.isJson ? `\`\`\`json\n${node.text}\n\`\`\`` : node.text);
  }
  return `${parts.join("\n\n")}\n`;
}

/** The chats of a file, as new ones. Throws an Error in plain words. */
export async function read(file) {
  const given = await file.text().then(JSON.parse).catch(() => null);
  if (given?.kind !== KIND || !Array.isArray(given.chats)) {
    throw new Error(`${tameName(file.name)} holds no chats of this page.`);
  }
  if (given.version > VERSION) throw new Error("This file was written by a newer mmchat.");
  const names = new Map();
  const found = [];
  for (const picture of Array.isArray(given.pictures) ? given.pictures : []) {
    const blob = blobOf(picture?.data);
    if (!blob) continue;
    const id = newId();
    names.set(picture.id, id);
    found.push({ id, name: tameName(picture.name ?? "picture"), blob, kept: Date.now() });
  }
  const chats = given.chats.map((chat) => adopt(chat, (id) => names.get(id))).filter(Boolean);
  await store.put({ chats, pictures: found });
  return chats;
}

function blobOf(data) {
  const head = typeof data === "string" ? DATA.exec(data) : null;
  if (!head) return null;
  try {
    const bytes = Uint8Array.from(atob(data.slice(head[0].length)), (c) => c.charCodeAt(0));
    return new Blob([bytes], { type: head[1] ?? "" });
  } catch {
    return null; // no base64
  }
}
