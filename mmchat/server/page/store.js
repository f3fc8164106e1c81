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

const open = (name, mode) => database.transaction(name, mode).objectStore(name);

export async function put(name, record) {
  if (database) await result(open(name, "readwrite").put(record));
  else memory[name].set(record.id, record);
}

export async function get(name, id) {
  return database ? result(open(name, "readonly").get(id)) : memory[name].get(id);
}

export async function all(name) {
  return database ? result(open(name, "readonly").getAll()) : [...memory[name].values()];
}

export async function ids(name) {
  return database ? result(open(name, "readonly").getAllKeys()) : [...memory[name].keys()];
}

export async function remove(name, id) {
  if (database) await result(open(name, "readwrite").delete(id));
  else memory[name].delete(id);
}

export async function removeAll() {
  for (const name of NAMES) {
    if (database) await result(open(name, "readwrite").clear());
    else memory[name].clear();
  }
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
