// Puts the page together: the chats, the one that is shown, the answers that are being written.

import { answer } from "./answer.js";
import * as api from "./api.js";
import * as tree from "./chat.js";
import { activeBox, Composer, takeDropsAndPastes } from "./composer.js";
import { $, announce, h, icon, iconButton, toast } from "./dom.js";
import { closeOnPhone, followEnd, hasTouch, isPhone, setSidebar, showMeter, toEnd, toggle,
  toggleSidebar } from "./frame.js";
import { listen } from "./keys.js";
import { Library } from "./library.js";
import * as pictures from "./pictures.js";
import { applyTheme, askKey, openSettings, openShortcuts, schemaProblem } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { watchServer } from "./watch.js";
import { welcome } from "./welcome.js";

let blank = tree.newChat(); // not begun yet; its draft is kept, too
let current = blank;
let editing = null; // {node, box}
const running = new Map(); // chat id -> {controller, node}
const drafts = new Map(); // chat id -> {text, pictures}

const box = new Composer({ submit: send, changed: () => showMeter(current, box), up: editLast });
const stopButton = h("button.stop", { hidden: true, onclick: stop, title: "Stop (Esc)" },
  icon("stop"), "Stop");
const thread = new Thread($("thread"), { edit, turn, resend, replace, removePicture,
  openSettings: showSettings });
const library = new Library({ changed: show, deleted, restored: openChat });
const sidebar = new Sidebar({ chats: () => library.chats, current: () => current,
  isRunning: (chat) => running.has(chat.id), open: (chat) => { openChat(chat); closeOnPhone(); },
  menu: (chat, anchor) => library.menu(chat, anchor) });
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

function newChat() {
  if (tree.lastNode(blank)) blank = tree.newChat();
  return blank;
}

function openNew() {
  openChat(newChat());
  closeOnPhone();
}

/** A chat is gone, or all are. */
function deleted(chat) {
  for (const [id, { controller }] of running) if (!chat || chat.id === id) controller.abort();
  if (!chat || chat === current) openNew();
  else show();
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
  if ($("banner").className === "well") $("banner").hidden = true; // what failed is asked again, or old
  if (chat.format === "schema" && schemaProblem(chat.schema)) {
    node.state = "stopped";
    node.error = { kind: "refused", text: "The JSON schema of this chat is not one yet." };
    await library.save(chat, question.pictures);
    show();
    return;
  }
  const controller = new AbortController();
  running.set(chat.id, { controller, node });
  await library.save(chat, question.pictures);
  show();
  toEnd();
  await answer(chat, question, node, { signal: controller.signal,
    save: () => library.has(chat) && library.save(chat), // it may have been deleted meanwhile
    paint: () => chat === current && paint(node) });
  running.delete(chat.id);
  if (chat === current) show();
  else sidebar.show();
  if (["gone", "broken", "busy"].includes(node.error?.kind)) watch();
  if (node.error?.kind === "key" && await enterKey() && chat === current) resend(node);
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

function stop() {
  running.get(current.id)?.controller.abort();
  box.focus();
}

function retry(node) {
  if (running.has(current.id)) return;
  begin(current, current.nodes[node.parent]);
}

/** An answer again: in its place if nothing had come, beside it otherwise. */
function resend(node) {
  if (!node || running.has(current.id)) return;
  if (node.text) {
    retry(node);
    return;
  }
  Object.assign(node, { state: "answering", error: null, note: null, finish: null });
  thread.views.delete(node.id);
  run(current, current.nodes[node.parent], node);
}

function turn(node, step) {
  const next = running.has(current.id) ? null : tree.turn(current, node, step);
  if (!next) return;
  library.save(current);
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

// --- settings and the server

function showSettings() {
  const changed = () => {
    if (library.has(current)) library.save(current);
    box.extras.replaceChildren(...activeSettings());
  };
  openSettings(current, changed, library);
}

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
    if (api.server.heat) show(); // the answers that can be looked into
    await pictures.remeasure(box.pictures);
    box.update();
  } catch (error) {
    if (error.kind === "key") await enterKey();
    else if (error.kind !== "refused") watch();
  }
}

// --- the frame

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

async function refresh() {
  if (document.hidden || running.size || editing) return;
  const newest = await library.refresh(current);
  if (newest !== current) thread.views.clear();
  current = newest;
  show();
}

async function start() {
  applyTheme();
  buildFrame();
  setSidebar(!isPhone() && store.settings.sidebar);
  const stays = await store.openStore();
  await library.load();
  const byAddress = () => library.find(location.hash.slice(1)) ?? newChat();
  document.addEventListener("visibilitychange", refresh);
  addEventListener("popstate", () => openChat(byAddress()));
  openChat(byAddress());
  await library.sweep();
  if (!stays) toast("This browser keeps nothing here: the chats go when the page is closed.");
  await meet();
  document.body.dataset.ready = "true";
}

start();
