// The server: its routes, its errors in words, and the key, which is held in memory.

export const server = { model: null, context: 0, heat: false, key: sessionStorage.getItem("key") ?? "" };

/** What went wrong. kind: gone, key, busy, refused or broken. */
export class ServerError extends Error {
  constructor(kind, message, { status = 0, code = "", wait = 0 } = {}) {
    super(message);
    Object.assign(this, { kind, status, code, wait });
  }
}

const GONE = "The server does not answer.";

export function keepKey(key, inThisTab) {
  server.key = key;
  if (inThisTab) sessionStorage.setItem("key", key);
  else sessionStorage.removeItem("key");
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (server.key) headers.Authorization = `Bearer ${server.key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("gone", GONE);
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

const post = (path, body, signal) => ask(path, { method: "POST", signal,
  headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

async function failure(answer) {
  const said = await answer.json().then((body) => body.error ?? {}, () => ({}));
  const message = said.message ?? `The server answered ${answer.status}.`;
  const wait = Number(answer.headers.get("Retry-After")) || 0;
  let kind = "refused";
  if (answer.status === 401) kind = "key";
  else if (answer.status === 429 || answer.status === 503) kind = "busy";
  return new ServerError(kind, message, { status: answer.status, code: said.code ?? "", wait });
}

/** "ok", "loading", "draining", or "gone". */
export async function health() {
  try {
    const answer = await fetch("health", { cache: "no-store" });
    return (await answer.json()).status ?? (answer.ok ? "ok" : "loading");
  } catch {
    return "gone";
  }
}

/** Learns the model's name, how long a conversation may be, and whether it tells where it looked. */
export async function meet() {
  const { data } = await (await ask("v1/models")).json();
  server.model = data[0].id;
  server.context = data[0].meta?.n_ctx ?? data[0].meta?.n_ctx_train ?? 0;
  server.heat = data[0].meta?.heat === true;
}

/**
 * What the model makes of a picture, given as data: {size, resized, grid, tokens, positions, lines,
 * details, notices, pages}; sizes are [height, width] in pixels, grid is [rows, columns]. Of several
 * pages the first is described, and tokens and positions are those of all.
 */
export async function tiles(dataUrl) {
  const answer = await post("page/tiles", { image_url: dataUrl });
  const { pictures } = await answer.json();
  const sum = (name) => pictures.reduce((so, page) => so + page[name], 0);
  return { ...pictures[0], tokens: sum("tokens"), positions: sum("positions"),
    pages: pictures.length };
}

/**
 * Where `answer` to the messages looked: {pictures: [{grid, cell}], words: [{text, start, end,
 * pictures: [{share, heat} or null]}]}; grid is [rows, columns] and cell [height, width] in pixels.
 */
export async function heat(messages, answer, signal) {
  return (await (await post("page/heat", { messages, answer }, signal)).json()).heat;
}

/** Yields {text, tokens} as they come, and {finish, usage, timings} where the server says them. */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await post("v1/chat/completions", asked, signal);
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError("broken", chunk.error.message, chunk.error);
    const [choice] = chunk.choices ?? [];
    yield {
      text: choice?.delta?.content ?? "",
      tokens: choice?.logprobs?.content ?? [],
      finish: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
      timings: chunk.timings ?? null,
    };
  }
  throw new ServerError("broken", "The connection broke in the middle of the answer.");
}

/** The data of server-sent events; lines may end anywhere in what is read at once. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("broken", "The connection broke in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
