// The box in which a question is written, with its pictures. One stands below the chat; another takes
// the place of a question that is edited.

import { announce, h, icon, iconButton, tameName, toast } from "./dom.js";
import * as pictures from "./pictures.js";

let active = null; // the box that gets what is dropped on the page or pasted anywhere

export const activeBox = () => active;

export class Composer {
  /** submit(text, pictures) sends; cancel, if given, makes this the box of an edit. */
  constructor({ submit, cancel = null, changed = () => {}, up = () => {} }) {
    Object.assign(this, { submit, changed, up, pictures: [], isBusy: false });
    this.text = h("textarea", { rows: "1", placeholder: "Ask about a picture, or anything",
      "aria-label": cancel ? "Edit the question" : "Your question", enterkeyhint: "send",
      oninput: () => this.update(), onkeydown: (event) => this.key(event),
      onfocus: () => { active = this; } });
    this.chips = h("ul.chips", { "aria-label": "Pictures of this question" });
    this.send = h("button.send", { "aria-disabled": "true", "aria-label": "Send", title: "Send (Enter)",
      onclick: () => this.trySend() }, icon("send"));
    const attach = async (files) => this.attach(await files);
    this.element = h("div.composer", {}, this.chips, this.text, h("div.row", {},
      iconButton("picture", "Add pictures (Alt+P)", () => attach(pictures.pick())),
      iconButton("camera", "Take a photo", () => attach(pictures.photograph())),
      this.extras = h("div.extras"),
      cancel ? h("button.plain", { onclick: cancel }, "Cancel") : null,
      this.send));
    if (cancel) this.element.classList.add("editing");
    this.cancel = cancel;
    if (!cancel) active = this;
  }

  load(text, given) {
    this.text.value = text;
    this.pictures = [...given];
    this.update();
  }

  focus() {
    active = this;
    this.text.focus();
  }

  release(other) {
    if (active === this) active = other;
  }

  key(event) {
    if (event.isComposing) return;
    const isPhone = matchMedia("(pointer: coarse)").matches;
    if (event.key === "Enter" && !event.shiftKey && !isPhone) {
      event.preventDefault();
      this.trySend();
    } else if (event.key === "ArrowUp" && !event.altKey && !this.text.value && !this.cancel) {
      event.preventDefault();
      this.up();
    } else if (event.key === "Escape" && this.cancel) {
      event.stopPropagation();
      this.cancel();
    }
  }

  /** Takes files that are pictures or documents, and says which are neither. */
  async attach(files, instead = null) {
    const given = [...files];
    const refused = given.filter((file) => !pictures.mayBePicture(file)).map(({ name }) => tameName(name));
    if (refused.length) toast(`Not a picture: ${refused.join(", ")}`);
    for (const file of given.filter(pictures.mayBePicture)) {
      const picture = await pictures.take(file, () => this.update());
      const at = instead ? this.pictures.indexOf(instead) : -1;
      if (at >= 0) this.pictures.splice(at, 1, picture);
      else this.pictures.push(picture);
      instead = null;
      announce(`${picture.name} added`);
      picture.measured.then(() => announce(`${picture.name}: ${pictures.cost(picture)}`));
    }
    this.update();
    if (given.length) this.text.focus();
  }

  remove(picture) {
    this.pictures = this.pictures.filter((other) => other !== picture);
    announce(`${picture.name} removed`);
    this.update();
    this.text.focus();
  }

  trySend() {
    const text = this.text.value.trim();
    if (this.isBusy || (!text && !this.pictures.length)) return;
    const bad = this.pictures.find((picture) => picture.error);
    if (bad) {
      toast(`${bad.name} cannot be sent: ${bad.error}`);
      return;
    }
    const given = this.pictures;
    this.load("", []);
    this.submit(text, given);
  }

  update() {
    const replace = async (picture) =>
      this.attach(await pictures.pick({ several: false }), picture);
    this.chips.replaceChildren(...this.pictures.map((picture) => pictures.chip(picture, {
      replace: () => replace(picture), remove: () => this.remove(picture) })));
    this.chips.hidden = !this.pictures.length;
    const hasSomething = this.text.value.trim() || this.pictures.length;
    const isReady = hasSomething && !this.isBusy && !this.pictures.some((one) => one.error);
    this.send.setAttribute("aria-disabled", String(!isReady));
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
    this.changed();
  }

  setBusy(isBusy) {
    this.isBusy = isBusy;
    this.update();
  }
}

/** Dropping anywhere and pasting anywhere give their pictures to the active box. */
export function takeDropsAndPastes(veil) {
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  let depth = 0; // enter and leave come for every element on the way
  const lift = () => { depth = 0; veil.hidden = true; };
  addEventListener("dragenter", (event) => {
    if (!hasFiles(event) || document.querySelector("dialog[open]")) return;
    depth += 1;
    veil.hidden = false;
  });
  addEventListener("dragleave", () => { depth -= 1; if (depth <= 0) lift(); });
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    lift();
    if (!hasFiles(event)) return; // text goes where it is dropped
    event.preventDefault();
    active?.attach(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    active?.attach(files);
  });
}
