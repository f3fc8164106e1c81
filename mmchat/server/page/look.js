// Where an answer looked: its words as buttons, and its pictures, lit where a word read them.

import { messages } from "./answer.js";
import * as api from "./api.js";
import { lineage } from "./chat.js";
import { $, h, icon, toast } from "./dom.js";
import { leaveEnd } from "./frame.js";
import * as pictures from "./pictures.js";

const QUESTION = "Where did it look?";
const NOTE = "Lit is where it read, not why it said so. Point at a word or go by the arrow keys; Enter"
  + " or a tap holds it, Escape closes this.";
const WIDTH = 512; // pixels of a map; it is scaled to its picture
const MARKS = /^[*_`#~]+(?=.)|(?<=[^*_`~])[*_`~]+$/gu; // of Markdown, around a word
const AROUND = /^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu;

/** Whether anything can be told of the answer `node`: the model tells, and there are pictures. */
export const canLook = (chat, node) => api.server.heat && node.text.trim() !== ""
  && lineage(chat, node).some((one) => one.pictures.length > 0);

/** The control below an answer. The panel that it opens stands in the place of `body`. */
export function lookButton(chat, node, body) {
  let asking = null;
  let heat = null;
  let panel = null;
  const label = h("span", {}, QUESTION);
  const button = h("button.look-button", { "aria-expanded": "false" }, icon("eye"), label);

  const show = (made) => {
    panel?.remove();
    panel = made;
    if (panel) body.before(panel);
    body.hidden = Boolean(panel);
    button.setAttribute("aria-expanded", String(Boolean(panel)));
    label.textContent = panel ? "Back to the answer" : QUESTION;
  };
  const close = () => {
    show(null);
    button.focus();
  };
  const open = async () => {
    asking = new AbortController();
    label.textContent = "Looking… (stop)";
    const question = chat.nodes[node.parent];
    try {
      heat ??= await api.heat(await messages(chat, question), node.text, asking.signal);
      show(await look(heat, node.text, lineage(chat, question), close));
      panel.querySelector(".word")?.focus({ preventScroll: true });
      reveal(panel.parentElement);
    } catch (error) {
      label.textContent = QUESTION;
      if (error.name !== "AbortError") toast(error.message);
    }
    asking = null;
  };
  button.addEventListener("click", () => {
    if (asking) asking.abort();
    else if (panel) close();
    else open();
  });
  return button;
}

/** All of it, or its beginning: two frames later, since a chat at its end is kept there as it grows. */
const reveal = (turn) => requestAnimationFrame(() => requestAnimationFrame(() => {
  const fits = turn.offsetHeight < $("scroll").clientHeight;
  if (!fits) leaveEnd();
  turn.scrollIntoView({ block: fits ? "nearest" : "start" });
}));

async function look(heat, text, nodes, close) {
  const shown = await figures(nodes, heat.pictures);
  const said = h("p.look-said", { "aria-live": "polite" });
  const words = h("div.words", { dir: "auto", role: "group", "aria-label": "The words of the answer" });
  const letters = [...text]; // the server counts code points
  const buttons = [];
  let kept = -1;
  let at = 0;

  const light = (number) => {
    const maps = heat.words[number]?.pictures;
    for (const { draw, index } of shown) draw(maps ? maps[index]?.heat ?? [] : null);
    said.textContent = maps ? reading(heat.words[number], shown) : "";
    buttons.forEach((one, n) => one.classList.toggle("lit", n === number));
  };
  const rest = () => light(kept >= 0 ? kept : buttons.indexOf(document.activeElement));
  const keep = (number) => {
    kept = kept === number ? -1 : number;
    buttons.forEach((one, n) => one.setAttribute("aria-pressed", String(n === kept)));
    light(number);
  };
  const go = (number) => {
    buttons.forEach((one, n) => { one.tabIndex = n === number ? 0 : -1; });
    buttons[number].focus();
  };
  heat.words.forEach((word, number) => {
    const button = h("button.word", { "aria-pressed": "false", tabindex: number ? "-1" : "0",
      onclick: () => keep(number), onfocus: () => light(number), onblur: () => light(kept),
      onpointerenter: ({ pointerType }) => pointerType === "mouse" && light(number),
      onpointerleave: ({ pointerType }) => pointerType === "mouse" && rest(),
    }, word.text.replace(MARKS, ""));
    words.append(letters.slice(at, word.start).join(""), button);
    buttons.push(button);
    at = word.end;
  });
  words.addEventListener("keydown", (event) => {
    const number = buttons.indexOf(event.target);
    const count = buttons.length;
    const next = { ArrowRight: number + 1, ArrowDown: number + 1, ArrowLeft: number - 1,
      ArrowUp: number - 1, Home: 0, End: count - 1 }[event.key];
    if (next === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    go((next + count) % count);
  });
  const panel = h("section.look", { "aria-label": QUESTION },
    h("div", { class: shown.length > 1 ? "look-pictures several" : "look-pictures" }, ...shown.map(({ frame }) => frame), said), words,
    h("p.look-note", {}, NOTE));
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation(); // an answer that is being written goes on
    close();
  });
  return panel;
}

/** The pictures of `nodes`: {frame, name, index, grid, draw(heat)}; a document is as many as its pages. */
async function figures(nodes, maps) {
  const shown = [];
  let index = 0;
  for (const id of nodes.flatMap((node) => node.pictures)) {
    const picture = await pictures.find(id);
    if (!picture || !maps[index]) continue;
    const frame = pictures.figure(picture);
    await frame.firstElementChild.decode().catch(() => {}); // the browser may not know it
    const canvas = h("canvas.heat", { "aria-hidden": "true", hidden: true });
    frame.append(canvas);
    const { grid, cell } = maps[index];
    const draw = (heat) => {
      const image = frame.querySelector("img");
      canvas.hidden = !heat || !image?.naturalWidth;
      if (canvas.hidden) return;
      const [height, width] = picture.facts?.size ?? [image.naturalHeight, image.naturalWidth];
      canvas.width = WIDTH;
      canvas.height = Math.max(1, Math.round((WIDTH * height) / width));
      const [down, right] = [grid[0] * cell[0] / height, grid[1] * cell[1] / width]; // over the edge
      const pen = canvas.getContext("2d");
      pen.imageSmoothingQuality = "high";
      pen.drawImage(shade(heat, grid), 0, 0, WIDTH * right, canvas.height * down);
    };
    shown.push({ frame, name: picture.name, index, grid, draw });
    index += picture.facts?.pages ?? 1;
  }
  return shown;
}

/** Dark where nothing was read, a warm light where much was; one pixel a patch. */
function shade(heat, [rows, columns]) {
  const small = h("canvas", { width: columns, height: rows });
  const pen = small.getContext("2d");
  const dots = pen.createImageData(columns, rows);
  for (let dot = 0; dot < rows * columns; dot += 1) {
    const light = heat[Math.floor(dot / columns)]?.[dot % columns] ?? 0;
    const warm = 0.55 * light;
    dots.data.set([255 * warm, 150 * warm, 40 * warm, 190 * (1 - light) + 40 * light], 4 * dot);
  }
  pen.putImageData(dots, 0, 0);
  return small;
}

/** The same in words: where in which picture it is brightest. */
function reading(word, shown) {
  let best = { value: 0 };
  for (const { name, index, grid } of shown) {
    word.pictures[index]?.heat.forEach((row, y) => row.forEach((value, x) => {
      if (value > best.value) best = { value, name, y: (y + 0.5) / grid[0], x: (x + 0.5) / grid[1] };
    }));
  }
  const text = word.text.replace(AROUND, "") || word.text;
  if (!best.value) return `“${text}”: nothing is known of it`;
  const third = (share, names) => names[Math.min(2, Math.floor(3 * share))];
  const place = [third(best.y, ["top", "", "bottom"]), third(best.x, ["left", "", "right"])];
  const where = place.filter(Boolean).join(" ") || "middle";
  return `“${text}” read most at the ${where}${shown.length > 1 ? ` of ${best.name}` : ""}`;
}
