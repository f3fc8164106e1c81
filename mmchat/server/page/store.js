// What stays in this browser: chats and pictures in IndexedDB, settings in localStorage. Where the
// browser keeps nothing (a private window), everything lives as long as the page.

const NAMES = ["chats", "pictures"];
let database = null;
const memory = { chats: new Map(), pictures: new Map() };

/** True if what is written stays. */
export async function openStore() {
  try {
    const request = indexedDB.open("mmchat", 1);
    request.onupgradeneeded = () => {
      for (const name of NAMES) request.result.createObjectStore(name, { keyPath: "id" });
    };
    database = await result(request);
    return true;
  } catch {
    return false;
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

const open = (name) => database.transaction(name).objectStore(name);

/** Calls act(transaction) and waits until all of it is written; it is that, or nothing of it. */
function write(names, act) {
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(names, "readwrite");
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new Error("the browser gave up"));
    act(transaction);
  });
}

/** Writes {chats: [...], pictures: [...]}: all, or nothing. */
export async function put(records) {
  const names = Object.keys(records);
  const each = (act) => names.forEach((name) => records[name].forEach((one) => act(name, one)));
  if (!database) each((name, record) => memory[name].set(record.id, record));
  else await write(names, (to) => each((name, record) => to.objectStore(name).put(record)));
}

export async function get(name, id) {
  return database ? result(open(name).get(id)) : memory[name].get(id);
}

export async function all(name) {
  return database ? result(open(name).getAll()) : [...memory[name].values()];
}

export async function remove(name, id) {
  if (database) await write([name], (from) => from.objectStore(name).delete(id));
  else memory[name].delete(id);
}

export async function removeAll() {
  if (database) await write(NAMES, (of) => NAMES.forEach((name) => of.objectStore(name).clear()));
  else NAMES.forEach((name) => memory[name].clear());
}

const DEFAULTS = { temperature: "", topP: "", maxTokens: "", seed: "", logprobs: false,
  theme: "system", sidebar: true };

export const settings = { ...DEFAULTS, ...stored() };

function stored() {
  try {
    return JSON.parse(localStorage.getItem("settings") ?? "{}");
  } catch {
    return {};
  }
}

export function saveSettings(changes = {}) {
  Object.assign(settings, changes);
  try {
    localStorage.setItem("settings", JSON.stringify(settings));
  } catch {
    // a private window: they hold while the page is open
  }
}
