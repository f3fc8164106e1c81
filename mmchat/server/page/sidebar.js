// The chats that this browser keeps, by day, with search.

import { matches } from "./chat.js";
import { $, h, icon } from "./dom.js";

const DAY = 24 * 60 * 60 * 1000;

export class Sidebar {
  constructor({ chats, current, isRunning, open, menu }) {
    Object.assign(this, { chats, current, isRunning, open, menu });
    $("search").addEventListener("input", () => this.show());
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.list().querySelector("button")?.click();
      if (event.key === "ArrowDown") {
        event.preventDefault();
        this.list().querySelector("button")?.focus();
      }
    });
    this.list().addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const rows = [...this.list().querySelectorAll("button.chat")];
      const at = rows.indexOf(document.activeElement?.closest("button.chat"));
      (rows[at + step] ?? (step < 0 ? $("search") : null))?.focus();
    });
  }

  list() {
    return $("chats");
  }

  show() {
    const words = $("search").value.trim();
    const found = this.chats()
      .filter((chat) => !words || matches(chat, words))
      .sort((a, b) => b.updated - a.updated);
    const groups = new Map();
    for (const chat of found) {
      const name = dayOf(chat.updated);
      groups.set(name, [...(groups.get(name) ?? []), chat]);
    }
    this.list().replaceChildren(...[...groups].map(([name, chats]) =>
      h("section", {}, h("h3", {}, name), h("ul", {}, ...chats.map((chat) => this.row(chat))))));
    if (!found.length) {
      const said = words ? `No chat has “${words}”.` : "Your chats will be here. They stay in this browser.";
      this.list().append(h("p.none", {}, said));
    }
  }

  row(chat) {
    const isCurrent = chat === this.current();
    const row = h("li", {},
      h("button.chat", { "aria-current": isCurrent ? "page" : null, onclick: () => this.open(chat) },
        this.isRunning(chat) ? h("span.pulse", { title: "Answering" }) : null,
        h("span", {}, chat.title || "New chat")));
    const more = h("button.icon-button.small", { "aria-label": `More about ${chat.title || "New chat"}`,
      "aria-haspopup": "menu", "aria-expanded": "false", onclick: () => this.menu(chat, more) },
    icon("more"));
    row.append(more);
    return row;
  }
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 7 * DAY) return "This week";
  return new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}
