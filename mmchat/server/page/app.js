// Puts the page together: the chats, the one that is shown, the answers that are being written.

import { answer } from "./answer.js";
import * as api from "./api.js";
import * as tree from "./chat.js";
import { activeBox, Composer, takeDropsAndPastes } from "./composer.js";
import { $, announce, h, icon, iconButton, number, openMenu, toast } from "./dom.js";
import { listen } from "./keys.js";
import * as pictures from "./pictures.js";
import { applyTheme, askKey, askText, openSettings, openShortcuts, schemaProblem } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import * as transfer from "./transfer.js";
import { watchServer } from "./watch.js";
import { welcome } from "./welcome.js";

const NEAR_END = 60; // pixels from the end that still count as being there

let chats = [];
let current = tree.newChat();
let editing = null; // {node, box}
const running = new Map(); // chat id -> {controller, node}
const drafts = new Map(); // chat id -> {text, pictures}

const box = new Composer({ submit: send, changed: showMeter, up: editLast });
const stopButton = h("button.stop", { hidden: true, onclick: stop, title: "Stop (Esc)" },
  icon("stop"), "Stop");
const thread = new Thread($("thread"), { retry, edit, turn, resend, replace, removePicture,
  openSettings: showSettings });
const sidebar = new Sidebar({ chats: () => chats, current: () => current,
  isRunning: (chat) => running.has(chat.id), open: (chat) => { openChat(chat); closeOnPhone(); },
  menu: chatMenu });
const watch = watchServer($("banner"), { found: meet, resend: () => resend(tree.lastNode(current)) });

// --- the chat that is shown

function openChat(chat) {
  drafts.set(current.id, { text: box.text.value, pictures: box.pictures });
  endEdit();
  current = chat;
  const draft = drafts.get(chat.id) ?? { text: "", pictures: [] };
  box.load(draft.text, draft.pictures);
  const hash = tree.lastNode(chat) ? `#${chat.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname);
  show();
  toEnd();
  if (!hasTouch()) box.focus(); // there the keyboard would cover the page
}

function openNew() {
  openChat(tree.newChat());
  closeOnPhone();
}

function show() {
  const nodes = tree.path(current);
  $("title").textContent = nodes.length ? current.title : "";
  document.title = nodes.length ? `${current.title} · mmchat` : "mmchat";
  $("welcome").hidden = nodes.length > 0;
  thread.show(current, nodes, editing);
  const isBusy = running.has(current.id);
  stopButton.hidden = !isBusy;
  box.setBusy(isBusy);
  editing?.box.setBusy(isBusy);
  box.extras.replaceChildren(...activeSettings());
  sidebar.show();
}

/** What of this chat's settings changes every answer stands beside the box. */
function activeSettings() {
  const tag = (text) => h("button.tag", { onclick: showSettings, title: "Open the settings" }, text);
  const tags = [];
  if (current.system.trim()) tags.push(tag("System prompt"));
  if (current.format !== "off") tags.push(tag(current.format === "json" ? "JSON" : "JSON schema"));
  return tags;
}

function showMeter() {
  if (!api.server.context) return;
  const last = tree.path(current).findLast((node) => node.stats?.total);
  const used = last?.stats.total ?? 0;
  const next = box.pictures.reduce((sum, one) => sum + (one.facts?.positions ?? 0), 0)
    + Math.ceil(box.text.value.length / 4);
  const share = (value) => `${Math.min(100, (100 * value) / api.server.context)}%`;
  const meter = $("meter");
  meter.hidden = !used && !box.pictures.length;
  meter.querySelector(".meter-used").style.width = share(used);
  meter.querySelector(".meter-next").style.width = share(next);
  meter.querySelector(".meter-text").textContent = `${number(used)} / ${number(api.server.context)}`;
  meter.setAttribute("aria-valuemax", api.server.context);
  meter.setAttribute("aria-valuenow", used);
  meter.setAttribute("aria-valuetext", `${number(used)} of ${number(api.server.context)} tokens`);
  meter.title = `The conversation fills ${number(used)} of ${number(api.server.context)} tokens`;
  meter.classList.toggle("full", used > 0.9 * api.server.context);
}

async function save(chat) {
  if (!chats.includes(chat)) chats.push(chat);
  try {
    await store.put("chats", chat);
  } catch (error) {
    announce(`This chat could not be kept: ${error.message}`);
  }
}

// --- asking and answering

function send(text, given) {
  const parent = tree.lastNode(current)?.id ?? null;
  ask(current, parent, text, given.map((one) => one.id));
}

function ask(chat, parent, text, pictureIds) {
  const question = tree.add(chat, parent, "user", { text, pictures: pictureIds });
  if (location.hash !== `#${chat.id}`) history.replaceState(null, "", `#${chat.id}`);
  begin(chat, question);
}

function begin(chat, question) {
  const node = tree.add(chat, question.id, "assistant", { state: "answering",
    model: api.server.model, looks: question.pictures.length > 0 });
  run(chat, question, node);
}

async function run(chat, question, node) {
  if (chat.format === "schema" && schemaProblem(chat.schema)) {
    node.state = "stopped";
    node.error = { kind: "refused", text: "The JSON schema of this chat is not one yet." };
    show();
    return;
  }
  const controller = new AbortController();
  running.set(chat.id, { controller, node });
  await save(chat);
  show();
  toEnd();
  await answer(chat, question, node, { signal: controller.signal, save: () => save(chat),
    paint: () => chat === current && paint(node) });
  running.delete(chat.id);
  if (chat === current) show();
  else sidebar.show();
  showMeter();
  if (node.error?.kind === "gone" || node.error?.kind === "broken") watch();
  if (node.error?.kind === "key" && await enterKey()) resend(node);
}

let isPainting = false;

/** At most once a frame. */
function paint(node) {
  if (isPainting) return;
  isPainting = true;
  requestAnimationFrame(() => {
    isPainting = false;
    thread.paint(node);
  });
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

/** Whoever is at the end stays there while the chat grows; whoever reads above is left alone. */
function followEnd() {
  const scroll = $("scroll");
  let isAtEnd = true;
  scroll.addEventListener("scroll", () => {
    const left = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
    isAtEnd = left < NEAR_END;
    $("to-end").hidden = left < 4 * NEAR_END;
  }, { passive: true });
  const watcher = new ResizeObserver(() => isAtEnd && toEnd());
  watcher.observe(scroll);
  watcher.observe($("thread"));
  $("to-end").append(icon("down"));
  $("to-end").addEventListener("click", toEnd);
}

function stop() {
  running.get(current.id)?.controller.abort();
  box.focus();
}

function retry(node) {
  if (running.has(current.id)) return;
  begin(current, current.nodes[node.parent]);
}

/** A failed answer again: in its place if nothing had come, beside it otherwise. */
function resend(node) {
  if (!node || running.has(current.id)) return;
  if (node.text) {
    retry(node);
    return;
  }
  Object.assign(node, { state: "answering", error: null, finish: null });
  thread.views.delete(node.id);
  run(current, current.nodes[node.parent], node);
}

function turn(node, step) {
  const next = tree.turn(current, node, step);
  if (!next || running.has(current.id)) return;
  save(current);
  show();
  const shown = $("thread").querySelector(`[data-node="${next.id}"]`);
  const [count, at] = tree.place(current, next);
  announce(`Version ${at + 1} of ${count}`);
  shown?.focus({ preventScroll: true });
  shown?.scrollIntoView({ block: "nearest" });
}

// --- changing what was asked

async function edit(node) {
  if (running.has(current.id)) return;
  endEdit();
  const given = (await Promise.all(node.pictures.map(pictures.find))).filter(Boolean);
  const submit = (text, chosen) => {
    endEdit();
    const parent = current.nodes[node.parent] ? node.parent : null;
    ask(current, parent, text, chosen.map((one) => one.id));
  };
  editing = { node, box: new Composer({ submit, cancel: () => { endEdit(); show(); box.focus(); } }) };
  show();
  editing.box.load(node.text, given);
  editing.box.focus();
}

function endEdit() {
  editing?.box.release(box);
  editing = null;
}

function editLast() {
  const last = tree.path(current).findLast((node) => node.role === "user");
  if (last) edit(last);
}

async function replace(node, id) {
  await edit(node);
  const old = editing?.box.pictures.find((one) => one.id === id);
  if (old) editing.box.attach(await pictures.pick({ several: false }), old);
}

async function removePicture(node, id) {
  await edit(node);
  const old = editing?.box.pictures.find((one) => one.id === id);
  if (old) editing.box.remove(old);
}

// --- chats as a whole

function chatMenu(chat, anchor) {
  openMenu(anchor, [
    ["Rename", () => rename(chat), "edit"],
    ["Save as Markdown", async () => transfer.download(transfer.fileName(chat, "md"),
      await transfer.asMarkdown(chat), "text/markdown"), "down"],
    ["Save as JSON", async () => transfer.download(transfer.fileName(chat, "json"),
      await transfer.asJson([chat]), "application/json"), "down"],
    ["Delete", () => remove(chat), "trash", "danger"],
  ]);
}

async function rename(chat) {
  const title = await askText("Rename this chat", "Title", chat.title);
  if (!title) return;
  chat.title = title;
  await save(chat);
  show();
}

/** Gone from sight at once, for good when it can no longer be taken back. */
async function remove(chat) {
  running.get(chat.id)?.controller.abort();
  chats = chats.filter((other) => other !== chat);
  await store.remove("chats", chat.id);
  if (chat === current) openNew();
  else show();
  toast("Chat deleted", "Undo", async () => {
    await save(chat);
    openChat(chat);
  });
}

/** Pictures that no chat holds any more, of deleted chats and unsent questions. */
async function sweep() {
  const held = new Set(chats.flatMap(tree.pictureIds));
  for (const { id } of await store.all("pictures")) if (!held.has(id)) await pictures.forget(id);
}

const data = {
  exportAll: async () => transfer.download("mmchat-chats.json", await transfer.asJson(chats),
    "application/json"),
  importAll: () => {
    const input = h("input", { type: "file", accept: ".json,application/json", hidden: true });
    input.addEventListener("change", async () => {
      try {
        const read = await transfer.read(input.files[0]);
        chats.push(...read);
        show();
        toast(`${read.length} ${read.length === 1 ? "chat" : "chats"} imported`);
      } catch (error) {
        toast(error.message);
      }
    });
    input.click();
  },
  removeAll: () => toast("Delete all chats and pictures for good?", "Delete all", async () => {
    for (const { controller } of running.values()) controller.abort();
    await store.removeAll();
    chats = [];
    openNew();
  }),
};

function showSettings() {
  const changed = () => {
    if (chats.includes(current)) save(current);
    box.extras.replaceChildren(...activeSettings());
  };
  openSettings(current, changed, data);
}

// --- the server

async function enterKey(isWrong = false) {
  const given = await askKey(isWrong || Boolean(api.server.key));
  if (!given) return false;
  api.keepKey(given.key, given.inThisTab);
  await meet();
  return true;
}

async function meet() {
  try {
    await api.meet();
    $("model").textContent = `${api.server.model} can be wrong. Look twice.`;
    await pictures.remeasure(box.pictures);
    box.update();
  } catch (error) {
    if (error.kind === "key") await enterKey();
    else if (error.kind !== "refused") watch();
  }
}

// --- the frame

const hasTouch = () => matchMedia("(pointer: coarse)").matches;
const isPhone = () => matchMedia("(max-width: 760px)").matches;

function setSidebar(isOpen) {
  document.body.dataset.sidebar = isOpen ? "open" : "closed";
  $("sidebar").inert = !isOpen;
  toggle.setAttribute("aria-expanded", String(isOpen));
  if (!isPhone()) store.saveSettings({ sidebar: isOpen });
}

const toggleSidebar = () => setSidebar(document.body.dataset.sidebar !== "open");
const closeOnPhone = () => isPhone() && setSidebar(false);
const toggle = iconButton("sidebar", "Chats (Ctrl+B)", toggleSidebar, { "aria-controls": "sidebar" });

function buildFrame() {
  $("bar-left").append(toggle);
  $("bar-right").append(iconButton("new", "New chat (Ctrl+Shift+O)", openNew),
    iconButton("settings", "Settings (Ctrl+,)", showSettings));
  $("sidebar-foot").append(
    h("button.plain", { onclick: openNew }, icon("new"), "New chat"),
    iconButton("keyboard", "Keyboard (Ctrl+/)", openShortcuts));
  $("question-box").append(box.element);
  box.send.before(stopButton);
  $("backdrop").addEventListener("click", closeOnPhone);
  $("welcome").append(...welcome(async (file, question) => {
    await box.attach([file]);
    box.text.value = question;
    box.trySend();
  }));
  followEnd();
  takeDropsAndPastes($("veil"));
  listen({ stop, openNew, toggleSidebar, showSettings, openShortcuts, retry, edit, turn,
    isBusy: () => running.has(current.id), node: (id) => current.nodes[id], box,
    attach: async () => activeBox().attach(await pictures.pick()),
    search: () => { setSidebar(true); $("search").focus(); } });
}

async function start() {
  applyTheme();
  buildFrame();
  setSidebar(!isPhone() && store.settings.sidebar);
  const stays = await store.openStore();
  chats = (await store.all("chats")).map(tree.settle);
  const byHash = () => chats.find((chat) => chat.id === location.hash.slice(1));
  addEventListener("popstate", () => openChat(byHash() ?? tree.newChat()));
  openChat(byHash() ?? tree.newChat());
  await sweep();
  if (!stays) toast("This browser keeps nothing here: the chats go when the page is closed.");
  await meet();
  document.body.dataset.ready = "true";
}

start();
