// The keyboard: every shortcut that the list in settings.js names, but those of the box itself.

import { copy } from "./dom.js";

const TURN = ".turn";

/** act: what the keys do; act.box is the box below the chat. */
export function listen(act) {
  addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const done = event.key === "Escape" ? escape(act) : command(event, act) || onTurn(event, act);
    if (done) event.preventDefault();
  });
}

function escape(act) {
  if (!act.isBusy() || document.querySelector(":popover-open")) return false;
  act.stop();
  return true;
}

function command(event, act) {
  const key = event.key.toLowerCase();
  if (event.altKey && !event.ctrlKey && !event.metaKey) {
    if (event.code === "KeyP") act.attach();
    else if (event.key === "ArrowUp") step(-1, act);
    else if (event.key === "ArrowDown") step(1, act);
    else return false;
    return true;
  }
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return false;
  const commands = { b: act.toggleSidebar, k: act.search, ",": act.showSettings,
    "/": act.openShortcuts };
  const run = event.shiftKey ? { o: act.openNew, "/": act.openShortcuts }[key] : commands[key];
  run?.();
  return Boolean(run);
}

/** The turn before or behind the one with the focus; behind the last is the box. */
function step(by, act) {
  const turns = [...document.querySelectorAll(TURN)];
  const at = turns.indexOf(document.activeElement?.closest(TURN));
  const next = at < 0 ? turns.length + (by < 0 ? -1 : 0) : Math.max(0, at + by);
  if (next < turns.length) {
    turns[next].focus();
    turns[next].scrollIntoView({ block: "nearest" });
  } else {
    act.box.focus();
  }
}

/** Single keys work on a turn that itself has the focus, so they never take what is typed. */
function onTurn(event, act) {
  const turn = document.activeElement;
  if (!turn?.matches(TURN) || event.ctrlKey || event.metaKey || event.altKey) return false;
  const node = act.node(turn.dataset.node);
  const isQuestion = node?.role === "user";
  const runs = {
    ArrowLeft: () => act.turn(node, -1),
    ArrowRight: () => act.turn(node, 1),
    c: () => copy(node.text),
    e: isQuestion && (() => act.edit(node)),
    r: !isQuestion && (() => act.retry(node)),
  };
  const run = node && runs[event.key];
  if (run) run();
  return Boolean(run);
}
