// The turns of a chat as they are seen, kept from paint to paint so that focus and place stay.

import { place } from "./chat.js";
import { announce, copy, h, icon, iconButton, number } from "./dom.js";
import { codeBlock, GrowingMarkdown, render } from "./markdown.js";
import { canLook, lookButton } from "./look.js";
import * as pictures from "./pictures.js";

const SENTENCE_END = /[.!?…:](?=\s)|\n/g;
const SURE = 0.9; // a token of this probability is not marked
const UNSURE = 0.5;

export class Thread {
  /** act: {edit, turn, resend, replace, removePicture, openSettings} of nodes. */
  constructor(element, act) {
    Object.assign(this, { element, act, views: new Map() });
  }

  /** Shows the nodes of `chat`; `editing` maps a node to the box that stands in its place. */
  show(chat, nodes, editing) {
    const wanted = new Set(nodes.map((node) => node.id));
    for (const id of this.views.keys()) if (!wanted.has(id)) this.views.delete(id);
    let at = this.element.firstElementChild;
    for (const node of nodes) {
      const view = this.view(chat, node);
      if (view.element === at) at = at.nextElementSibling;
      else this.element.insertBefore(view.element, at);
      view.update(place(chat, node), editing?.node === node ? editing.box : null);
    }
    while (at) {
      const next = at.nextElementSibling;
      at.remove();
      at = next;
    }
  }

  view(chat, node) {
    if (!this.views.has(node.id)) {
      const Kind = node.role === "user" ? Question : Answer;
      this.views.set(node.id, new Kind(node, this.act, chat));
    }
    return this.views.get(node.id);
  }

  paint(node) {
    this.views.get(node.id)?.grow();
  }
}

/** ‹ 2/3 › where a turn has siblings. */
function branches(node, [count, at], act) {
  if (count < 2) return null;
  const step = (name, label, by, off) =>
    iconButton(name, label, () => act.turn(node, by), { disabled: off });
  return h("span.branches", { role: "group", "aria-label": `Version ${at + 1} of ${count}` },
    step("back", "Earlier version", -1, at === 0), h("span", {}, `${at + 1}/${count}`),
    step("forward", "Later version", 1, at === count - 1));
}

function copyButton(text, label) {
  const button = iconButton("copy", label, async () => {
    if (!await copy(text())) return;
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

class Question {
  constructor(node, act) {
    Object.assign(this, { node, act });
    this.element = h("article.turn.question", { tabindex: "-1", "aria-label": "You" });
    this.element.dataset.node = node.id;
  }

  update(siblings, box) {
    const seen = JSON.stringify([siblings, this.node.pictures, Boolean(box)]);
    if (seen === this.seen) return;
    this.seen = seen;
    if (box) {
      this.element.replaceChildren(box.element);
      return;
    }
    const { node, act } = this;
    const row = h("div.prints");
    this.element.replaceChildren(row);
    if (node.text) this.element.append(h("div.bubble", { dir: "auto" }, node.text));
    this.element.append(h("footer", {}, branches(node, siblings, act),
      iconButton("edit", "Edit the question", () => act.edit(node)),
      copyButton(() => node.text, "Copy the question")));
    this.showPictures(row);
  }

  async showPictures(row) {
    for (const id of this.node.pictures) {
      const slot = h("span.print.empty");
      row.append(slot);
      const picture = await pictures.find(id);
      if (!picture) {
        slot.replaceChildren("This picture is gone.");
        continue;
      }
      const look = () => pictures.show(picture, {
        replace: () => this.act.replace(this.node, id),
        remove: () => this.act.removePicture(this.node, id) });
      slot.replaceWith(h("button.print", { "aria-label": `Show ${picture.name}`, onclick: look },
        pictures.figure(picture)));
    }
  }

  grow() {}
}

class Answer {
  constructor(node, act, chat) {
    Object.assign(this, { node, act, chat, spoken: 0 });
    this.body = h("div.prose", { dir: "auto" });
    this.status = h("div.status");
    this.foot = h("footer");
    this.element = h("article.turn.answer", { tabindex: "-1", "aria-label": "Answer" },
      this.body, this.status, this.foot);
    this.element.dataset.node = node.id;
    if (node.state === "answering") this.markdown = new GrowingMarkdown(this.body);
    else this.spoken = Infinity; // not read aloud again
  }

  update(siblings) {
    const { state, text, error } = this.node;
    const looks = canLook(this.chat, this.node);
    const seen = JSON.stringify([siblings, state, error, looks, state === "answering" || text.length]);
    if (seen === this.seen) return;
    this.seen = seen;
    this.siblings = siblings;
    if (state === "answering") {
      this.grow();
      return;
    }
    this.element.querySelector(".look")?.remove();
    this.body.hidden = false;
    this.body.replaceChildren();
    this.markdown = null;
    if (this.node.isJson && text) this.body.append(codeBlock(text, "json"));
    else render(this.body, text);
    this.element.classList.remove("growing");
    this.status.replaceChildren(...this.notices());
    this.foot.replaceChildren(...this.footer());
  }

  /** What came since the last paint. */
  grow() {
    const { node } = this;
    if (node.state !== "answering") return;
    this.element.classList.add("growing");
    this.foot.replaceChildren();
    if (node.isJson && node.text) this.body.replaceChildren(codeBlock(node.text, "json"));
    else this.markdown?.update(node.text);
    if (node.text) this.status.replaceChildren();
    else if (!this.status.childElementCount) this.status.append(waiting(node));
    this.speak(lastSentence(node.text, this.spoken));
  }

  speak(end) {
    if (end <= this.spoken) return;
    const said = this.node.text.slice(this.spoken, end).trim();
    this.spoken = end;
    if (said) announce(said);
  }

  notices() {
    const { node, act } = this;
    this.speak(node.text.length);
    const notice = (text, look, ...more) => h("p", { class: `notice ${look}` }, text, ...more);
    const link = (label, run) => h("button.link", { onclick: run }, label);
    const made = [];
    if (node.error) {
      const wait = node.error.wait ? ` It asks to wait ${number(node.error.wait)} s.` : "";
      made.push(notice(`${node.error.text}${wait} `, "bad", link("Send again", () => act.resend(node))));
      announce(node.error.text);
    } else if (node.state === "stopped") {
      made.push(notice(node.note ?? "Stopped.", "quiet"));
    } else if (node.finish === "length") {
      made.push(notice("Cut at the limit of tokens. ", "quiet", link("Allow more", act.openSettings)));
    } else if (!node.text) {
      made.push(notice("The model had nothing to say.", "quiet"));
    }
    return made;
  }

  footer() {
    const { node, act } = this;
    const row = [branches(node, this.siblings, act)];
    const again = iconButton("retry", "Answer again", () => act.resend(node));
    if (!node.text && !node.error) row.push(again); // an error says how
    if (node.text) {
      row.push(copyButton(() => node.text, "Copy the answer"), again, statistics(node.stats));
      if (canLook(this.chat, node)) row.push(lookButton(this.chat, node, this.body));
    }
    const made = [h("div.row", {}, ...row.filter(Boolean))];
    if (node.tokens?.length) made.push(probabilities(node.tokens));
    return made;
  }
}

function lastSentence(text, from) {
  if (!Number.isFinite(from)) return 0;
  let end = 0;
  for (const found of text.slice(from).matchAll(SENTENCE_END)) end = from + found.index + 1;
  return end;
}

function waiting(node) {
  const words = node.looks ? "Looking" : "Reading";
  return h("p.waiting", {}, h("span.looking", { "aria-hidden": "true" }, h("i"), h("i"), h("i"), h("i")),
    words, h("span.dots", { "aria-hidden": "true" }, "…"));
}

const seconds = (ms) => (ms < 1000 ? `${number(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function statistics(stats) {
  if (!stats?.tokens) return null;
  const facts = [[`${number(stats.tokens)} tokens`, "tokens of the answer"]];
  const add = (value, text, tip) => value !== null && value !== undefined && facts.push([text(), tip]);
  add(stats.rate, () => `${stats.rate.toFixed(stats.rate < 10 ? 1 : 0)} tokens/s`, "speed of writing");
  add(stats.firstMs, () => `first after ${seconds(stats.firstMs)}`, "from sending to the first token");
  add(stats.visionMs || null, () => `pictures ${seconds(stats.visionMs)}`, "encoding the pictures");
  add(stats.cached || null, () => `${number(stats.cached)} of ${number(stats.prompt)} cached`,
    "tokens of the prompt that were known from before");
  return h("ul.stats", { "aria-label": "Statistics" },
    ...facts.map(([text, tip]) => h("li", { title: tip }, text)));
}

/** The tokens of an answer, the unsure ones marked; what else could have stood there as a tip. */
function probabilities(tokens) {
  const percent = (p) => `${(100 * p).toFixed(p > 0.995 || p < 0.1 ? 1 : 0)} %`;
  const look = (p) => (p >= SURE ? "" : p >= UNSURE ? "less" : "least");
  const list = h("div.tokens", { tabindex: "0", role: "region", "aria-label": "Probabilities" });
  for (const { token, p, others } of tokens) {
    const rest = others.map(([other, q]) => `${JSON.stringify(other)} ${percent(q)}`).join("\n");
    list.append(h("span", { class: look(p), title: `${percent(p)}\n${rest}` }, token));
  }
  const unsure = tokens.filter(({ p }) => p < UNSURE).length;
  return h("details.probabilities", {}, h("summary", {}, `Probabilities: ${unsure} of ${
    number(tokens.length)} tokens below ${percent(UNSURE)}`), list);
}
