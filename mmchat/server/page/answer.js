// One answer: the request, the stream, what is measured on the way, and what is kept of it.

import * as api from "./api.js";
import { lineage } from "./chat.js";
import { dataUrl, find } from "./pictures.js";
import { settings } from "./store.js";

const SAVE_EVERY_MS = 700;

/** What of the settings goes into a request; empty fields are the model's own. */
function sampling() {
  const body = {};
  const set = (name, value) => { if (value !== "" && value !== null) body[name] = Number(value); };
  set("temperature", settings.temperature);
  set("top_p", settings.topP);
  set("max_tokens", settings.maxTokens);
  set("seed", settings.seed);
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: 4 });
  return body;
}

function format(chat) {
  if (chat.format === "json") return { response_format: { type: "json_object" } };
  if (chat.format !== "schema" || !chat.schema.trim()) return {};
  const schema = JSON.parse(chat.schema);
  return { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } };
}

export async function messages(chat, upTo) {
  const list = [];
  if (chat.system.trim()) list.push({ role: "system", content: chat.system });
  for (const node of lineage(chat, upTo)) {
    if (node.role === "assistant") {
      if (node.text) list.push({ role: "assistant", content: node.text });
      continue;
    }
    const parts = [];
    for (const id of node.pictures) {
      const picture = await find(id);
      if (!picture) throw new api.ServerError("refused", "A picture of this chat is gone; edit its turn.");
      parts.push({ type: "image_url", image_url: { url: await dataUrl(picture.blob) } });
    }
    if (node.text) parts.push({ type: "text", text: node.text });
    list.push({ role: "user", content: parts });
  }
  return list;
}

/**
 * Writes the answer to `question` into `node`. `paint()` is called as it grows, `save()` now and then.
 * Rejects never: what went wrong is node.error = {kind, text, wait}.
 */
export async function answer(chat, question, node, { signal, paint, save }) {
  const begun = performance.now();
  let first = 0;
  let saved = begun;
  let used = null;
  let timings = null;
  node.isJson = chat.format !== "off";
  try {
    const body = { model: api.server.model ?? "default", messages: await messages(chat, question),
      ...sampling(), ...format(chat) };
    for await (const part of api.chat(body, signal)) {
      if (part.text && !first) first = performance.now();
      node.text += part.text;
      if (part.tokens.length) (node.tokens ??= []).push(...part.tokens.map(kept));
      node.finish = part.finish ?? node.finish;
      used = part.usage ?? used;
      timings = part.timings ?? timings;
      paint();
      if (performance.now() - saved > SAVE_EVERY_MS) {
        saved = performance.now();
        save();
      }
    }
    node.state = "done";
  } catch (error) {
    node.state = "stopped";
    if (error.name !== "AbortError") {
      node.error = { kind: error.kind ?? "broken", text: error.message, wait: error.wait ?? 0 };
    }
  }
  chat.updated = Date.now();
  node.stats = statistics({ begun, first, used, timings });
  save();
  paint();
}

const kept = ({ token, logprob, top_logprobs: others }) =>
  ({ token, p: Math.exp(logprob), others: (others ?? []).map((o) => [o.token, Math.exp(o.logprob)]) });

function statistics({ begun, first, used, timings }) {
  const end = performance.now();
  const tokens = used?.completion_tokens ?? timings?.predicted_n ?? null;
  const measured = first && tokens > 1 ? ((tokens - 1) * 1000) / (end - first) : null;
  return {
    firstMs: first ? first - begun : null,
    tokens,
    rate: timings?.predicted_per_second ?? measured,
    visionMs: timings?.vision_ms ?? null,
    queueMs: timings?.queue_ms ?? null,
    prompt: used?.prompt_tokens ?? null,
    cached: used?.prompt_tokens_details?.cached_tokens ?? timings?.cache_n ?? null,
    total: used?.total_tokens ?? null,
  };
}
