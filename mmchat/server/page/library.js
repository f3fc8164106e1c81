// The chats of this browser as a whole: kept, renamed, deleted, written to files and read from them.

import * as tree from "./chat.js";
import { counted, h, openMenu, toast } from "./dom.js";
import * as pictures from "./pictures.js";
import { askText } from "./settings.js";
import * as store from "./store.js";
import * as transfer from "./transfer.js";

const DAY_MS = 24 * 60 * 60 * 1000;

export class Library {
  /** changed(): something is other than shown. deleted(chat), restored(chat): of one, null: of all. */
  constructor({ changed, deleted, restored }) {
    Object.assign(this, { chats: [], untold: true, changed, deleted, restored });
  }

  async load() {
    this.chats = (await store.all("chats")).map(tree.settle);
  }

  /** What other tabs have written since. Of `chat` whichever was changed last is kept, and returned. */
  async refresh(chat) {
    await this.load();
    const at = this.chats.findIndex((other) => other.id === chat.id);
    if (at < 0 || this.chats[at].updated > chat.updated) return this.chats[at] ?? chat;
    this.chats[at] = chat;
    return chat;
  }

  has(chat) {
    return this.chats.includes(chat);
  }

  find(id) {
    return this.chats.find((chat) => chat.id === id) ?? null;
  }

  /** given: ids of pictures to store with it. An answer is saved often: a failure is told once. */
  async save(chat, given = []) {
    if (!this.has(chat)) this.chats.push(chat);
    try {
      await store.put({ chats: [chat], pictures: pictures.records(given) });
      this.untold = true;
    } catch (error) {
      const why = error.name === "QuotaExceededError" ? "the browser has no room left for this page"
        : error.message;
      if (this.untold || given.length) {
        toast(`This chat is not kept: ${why}.`, "Save as JSON", () => this.saveAsJson(chat));
      }
      this.untold = false;
    }
  }

  async saveAsJson(chat) {
    const { asJson, download, fileName } = transfer;
    download(fileName(chat, "json"), await asJson([chat]), "application/json");
  }

  menu(chat, anchor) {
    const { download, fileName } = transfer;
    openMenu(anchor, [
      ["Rename", () => this.rename(chat), "edit"],
      ["Save as Markdown", async () =>
        download(fileName(chat, "md"), await transfer.asMarkdown(chat), "text/markdown"), "down"],
      ["Save as JSON", () => this.saveAsJson(chat), "down"],
      ["Delete", () => this.remove(chat), "trash", "danger"],
    ]);
  }

  async rename(chat) {
    const title = await askText("Rename this chat", "Title", chat.title);
    if (!title) return;
    chat.title = title;
    await this.save(chat);
    this.changed();
  }

  /** Its pictures go when a page is opened next; this one holds them, to take it back. */
  async remove(chat) {
    this.chats = this.chats.filter((other) => other !== chat);
    const held = tree.pictureIds(chat);
    await Promise.all(held.map(pictures.find));
    await store.remove("chats", chat.id);
    this.deleted(chat);
    toast("Chat deleted", "Undo", async () => {
      await this.save(chat, held);
      this.restored(chat);
    });
  }

  removeAll() {
    toast("Delete all chats and pictures for good?", "Delete all", async () => {
      this.chats = [];
      await store.removeAll();
      this.deleted(null);
    });
  }

  /** Forgets pictures that no chat holds; new ones may be of a chat that another tab has begun. */
  async sweep() {
    const held = new Set(this.chats.flatMap(tree.pictureIds));
    for (const { id, kept = 0 } of await store.all("pictures")) {
      if (!held.has(id) && kept < Date.now() - DAY_MS) await pictures.forget(id);
    }
  }

  async exportAll() {
    transfer.download("mmchat-chats.json", await transfer.asJson(this.chats), "application/json");
  }

  importAll() {
    const input = h("input", { type: "file", accept: ".json,application/json", hidden: true });
    input.addEventListener("change", async () => {
      try {
        const read = await transfer.read(input.files[0]);
        this.chats.push(...read);
        this.changed();
        toast(`${counted(read.length, "chat")} imported`);
      } catch (error) {
        toast(error.message);
      }
    });
    input.click();
  }
}
