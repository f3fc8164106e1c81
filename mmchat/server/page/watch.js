// The calm banner: the server is away or loads its model; it is back, or ready.

import * as api from "./api.js";
import { h } from "./dom.js";

const FIRST_MS = 1000;
const LONGEST_MS = 10_000;
const GOODBYE_MS = 8000;
const WORDS = {
  gone: "The server does not answer. Nothing is lost; the page keeps looking for it.",
  loading: "The model is being loaded.",
  draining: "The server is about to stop. It finishes what it has begun.",
};

/** Returns watch(): looks for the server until it is well, then calls found(). */
export function watchServer(banner, { found, resend }) {
  let isWatching = false;

  const say = (look, text, ...more) => {
    banner.className = look;
    banner.replaceChildren(h("span.lamp", { "aria-hidden": "true" }), h("span", {}, text), ...more);
    banner.hidden = false;
  };

  const well = (text) => {
    const failed = document.querySelector(".turn:last-child .notice.bad");
    const again = failed && h("button.link", { onclick: resend }, "Send again");
    say("well", text, again ?? "");
    if (!failed) setTimeout(() => { if (!isWatching) banner.hidden = true; }, GOODBYE_MS);
    found();
  };

  return async function watch() {
    if (isWatching) return;
    isWatching = true;
    let wait = FIRST_MS;
    const seen = new Set();
    for (;;) {
      const state = await api.health();
      if (state === "ok") break;
      seen.add(state);
      say("away", WORDS[state] ?? WORDS.gone);
      await new Promise((resolve) => setTimeout(resolve, wait));
      wait = Math.min(LONGEST_MS, wait * 1.5);
    }
    isWatching = false;
    const wasAway = seen.size > Number(seen.has("loading"));
    if (seen.size) well(wasAway ? "The server is back." : "The model is ready.");
  };
}
