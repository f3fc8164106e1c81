// What stands around the chat: the list of chats at the side, the meter, the end that is followed.

import { server } from "./api.js";
import { path } from "./chat.js";
import { $, icon, iconButton, number } from "./dom.js";
import { saveSettings } from "./store.js";

const NEAR_END = 60; // pixels from the end that still count as being there
const LETTERS_A_TOKEN = 4; // of a question that is not sent yet; the server counts what is
const NEARLY_FULL = 0.9;

/** How full the context is, and what the question in `box` will add. */
export function showMeter(chat, box) {
  if (!server.context) return;
  const last = path(chat).findLast((node) => node.stats?.total);
  const used = last?.stats.total ?? 0;
  const next = box.pictures.reduce((sum, one) => sum + (one.facts?.positions ?? 0), 0)
    + Math.ceil(box.text.value.length / LETTERS_A_TOKEN);
  const share = (value) => `${Math.min(100, (100 * value) / server.context)}%`;
  const meter = $("meter");
  meter.hidden = !used && !box.pictures.length;
  meter.querySelector(".meter-used").style.width = share(used);
  meter.querySelector(".meter-next").style.width = share(next);
  meter.querySelector(".meter-text").textContent = `${number(used)} / ${number(server.context)}`;
  meter.setAttribute("aria-valuemax", server.context);
  meter.setAttribute("aria-valuenow", used);
  meter.setAttribute("aria-valuetext", `${number(used)} of ${number(server.context)} tokens`);
  meter.title = `The conversation fills ${number(used)} of ${number(server.context)} tokens`;
  meter.classList.toggle("full", used > NEARLY_FULL * server.context);
}

export function toEnd() {
  $("scroll").scrollTop = $("thread").childElementCount ? $("scroll").scrollHeight : 0;
}

let isAtEnd = true;

/** Show a place above: the end is not followed, however much grows before the browser has scrolled. */
export const leaveEnd = () => { isAtEnd = false; };

/** Whoever is at the end stays there while the chat grows; whoever reads above is left alone. */
export function followEnd() {
  const scroll = $("scroll");
  let last = 0;
  scroll.addEventListener("scroll", () => {
    const left = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
    // the chat may have grown since it was scrolled to its end: only a move upwards leaves the end
    isAtEnd = left < NEAR_END || (isAtEnd && scroll.scrollTop >= last);
    last = scroll.scrollTop;
    $("to-end").hidden = left < 4 * NEAR_END;
  }, { passive: true });
  const watcher = new ResizeObserver(() => isAtEnd && toEnd());
  watcher.observe(scroll);
  watcher.observe($("thread"));
  $("to-end").append(icon("down"));
  $("to-end").addEventListener("click", toEnd);
}

export const hasTouch = () => matchMedia("(pointer: coarse)").matches;
export const isPhone = () => matchMedia("(max-width: 760px)").matches;

export function setSidebar(isOpen) {
  document.body.dataset.sidebar = isOpen ? "open" : "closed";
  $("sidebar").inert = !isOpen;
  toggle.setAttribute("aria-expanded", String(isOpen));
  if (!isPhone()) saveSettings({ sidebar: isOpen });
}

export const toggleSidebar = () => setSidebar(document.body.dataset.sidebar !== "open");
export const closeOnPhone = () => isPhone() && setSidebar(false);
export const toggle = iconButton("sidebar", "Chats (Ctrl+B)", toggleSidebar, { "aria-controls": "sidebar" });
