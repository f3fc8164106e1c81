// A picture of the reader: kept as it was given, shown with the tiles that the model cuts it into.

import * as api from "./api.js";
import { counted, h, icon, iconButton, newId, number, openDialog, tameName } from "./dom.js";
import * as store from "./store.js";

const LARGEST = 20 * 1024 * 1024; // bytes that are sent as they are
const SCALED_TO = 2240; // pixels of the longer side: 4 tiles of 1,120 hold no more
const QUALITY = 0.92;

const loaded = new Map(); // id -> picture: {id, name, blob, url, facts, error}

/** A new picture of `file`; `change` is called when its tiles are known. */
export async function take(file, change) {
  const blob = file.size > LARGEST ? await scaled(file) : file;
  const picture = { id: newId(), name: tameName(file.name || "pasted picture"), blob };
  picture.url = URL.createObjectURL(blob);
  loaded.set(picture.id, picture);
  picture.measured = measure(picture).then(change);
  change();
  return picture;
}

async function measure(picture) {
  try {
    picture.facts = await api.tiles(await dataUrl(picture.blob));
    picture.error = null;
  } catch (error) {
    if (error.kind === "refused" && error.status < 500) picture.error = error.message.replace("'image_url'", "This file");
  }
}

/** What is stored of those taken or found; pictures never sent live as long as the page. */
export const records = (ids) => ids.map((id) => loaded.get(id)).filter(Boolean)
  .map(({ id, name, blob, facts }) => ({ id, name, blob, facts, kept: Date.now() }));

/** Asks again for what could not be asked: the server was away, or wanted its key. */
export const remeasure = (pictures) =>
  Promise.all(pictures.filter((one) => !one.facts && !one.error).map(measure));

async function scaled(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return file; // the server says what it thinks of it
  const factor = Math.min(1, SCALED_TO / Math.max(bitmap.width, bitmap.height));
  const canvas = h("canvas", { width: Math.round(bitmap.width * factor),
    height: Math.round(bitmap.height * factor) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) =>
    canvas.toBlob((blob) => resolve(blob ?? file), "image/jpeg", QUALITY));
}

/** The picture of this id, or null where it is gone. */
export async function find(id) {
  if (loaded.has(id)) return loaded.get(id);
  const kept = await store.get("pictures", id);
  if (!kept) return null;
  const picture = { ...kept, url: URL.createObjectURL(kept.blob) };
  loaded.set(id, picture);
  return picture;
}

export async function forget(id) {
  const picture = loaded.get(id);
  if (picture) URL.revokeObjectURL(picture.url);
  loaded.delete(id);
  await store.remove("pictures", id);
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export function cost(picture) {
  if (picture.error) return picture.error;
  if (!picture.facts) return "cost not known yet";
  const { grid, pages, tokens } = picture.facts;
  const tiles = counted(grid[0] * grid[1], "tile");
  return `${pages > 1 ? counted(pages, "page") : tiles} · ${number(tokens)} tokens`;
}

/** The picture with the lines of its tiles over it, and room for what lies above them. */
export function figure(picture) {
  const image = h("img", { src: picture.url, alt: picture.name, draggable: false });
  const frame = h("span.frame", {}, image);
  image.addEventListener("error", () => {
    frame.classList.add("unseen"); // the model may still read it: HEIC, TIFF
    image.replaceWith(icon("picture"));
  });
  image.addEventListener("load", () =>
    frame.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight));
  if (picture.facts) frame.append(gridLines(picture.facts));
  return frame;
}

/** The lines lie where the tiles meet; the picture fills the canvas from the top left. */
function gridLines({ grid, resized, details }) {
  const [rows, columns] = grid;
  const [height, width] = resized;
  const tile = details.tile_size ?? Math.max(height / rows, width / columns);
  const lines = h("span.tiles", { "aria-hidden": "true" });
  const line = (look, side, share) => {
    if (share >= 1) return;
    const made = h(`i.${look}`);
    made.style[side] = `${(100 * share).toFixed(2)}%`;
    lines.append(made);
  };
  for (let row = 1; row < rows; row += 1) line("across", "top", (row * tile) / height);
  for (let column = 1; column < columns; column += 1) line("upright", "left", (column * tile) / width);
  return lines;
}

/** What waits in a box to be sent, with what it costs. */
export function chip(picture, { replace, remove }) {
  const words = h("span.chip-words", {}, h("span.chip-name", { title: picture.name }, picture.name),
    h("span.chip-cost", {}, cost(picture)),
    ...(picture.facts?.notices ?? []).map((notice) => h("span.chip-cost", {}, notice)));
  const view = h("button.chip-view", { "aria-label": `Show ${picture.name}`,
    onclick: () => show(picture) }, figure(picture));
  const made = h("li.chip", {}, view, words,
    iconButton("swap", `Replace ${picture.name}`, replace),
    iconButton("close", `Remove ${picture.name}`, remove));
  if (picture.error) made.classList.add("bad");
  return made;
}

/** The picture in large. `.layers` is where a map of the model's attention will lie. */
export function show(picture, { replace, remove } = {}) {
  const stage = h("div.stage", {}, figure(picture), h("span.layers"));
  const facts = h("dl.facts");
  const say = (label, value) => facts.append(h("div", {}, h("dt", {}, label), h("dd", {}, value)));
  if (picture.facts) {
    const { size: [height, width], lines, tokens, positions } = picture.facts;
    say("picture", `${number(width)} × ${number(height)} px`);
    for (const [label, value] of lines) say(label, value);
    say("tokens", `${number(tokens)} to attend to`);
    say("context", counted(positions, "position"));
    for (const notice of picture.facts.notices) say("note", notice);
  } else {
    say("cost", cost(picture));
  }
  const toggle = h("button.plain", { "aria-pressed": "true", onclick: () => {
    const on = stage.classList.toggle("bare");
    toggle.setAttribute("aria-pressed", String(!on));
  } }, icon("grid"), "Tiles");
  const row = h("div.row", {}, toggle);
  const dialog = openDialog(picture.name, h("div", {}, stage, facts, row), { look: "viewer" });
  const act = (run) => () => { dialog.close(); run(); };
  if (replace) row.append(h("button.plain", { onclick: act(replace) }, icon("swap"), "Replace"));
  if (remove) row.append(h("button.plain", { onclick: act(remove) }, icon("trash"), "Remove"));
}

/** The server says the rest; a file of no type may be a picture that the browser does not know. */
export const mayBePicture = ({ type }) => /^(image\/|application\/pdf$|$)/.test(type);

/** Lets the reader pick files; resolves to them, none where nothing was picked. */
export function pick({ several = true, camera = false } = {}) {
  return new Promise((resolve) => {
    const input = h("input", { type: "file", accept: "image/*,application/pdf", multiple: several, hidden: true });
    if (camera) input.setAttribute("capture", "environment");
    const end = (files) => { input.remove(); resolve(files); };
    input.addEventListener("change", () => end([...input.files]));
    input.addEventListener("cancel", () => end([]));
    document.body.append(input);
    input.click();
  });
}

/** A photo: by the phone's own camera, elsewhere by what the browser lends. */
export async function photograph() {
  const isPhone = matchMedia("(pointer: coarse)").matches;
  const lent = isPhone ? null : await navigator.mediaDevices?.getUserMedia({
    video: { facingMode: "environment", width: { ideal: 1920 } } }).catch(() => null);
  return lent ? shoot(lent) : pick({ several: false, camera: true });
}

function shoot(stream) {
  return new Promise((resolve) => {
    const video = h("video", { autoplay: true, muted: true, playsInline: true });
    video.srcObject = stream;
    let photos = [];
    const press = () => {
      const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext("2d").drawImage(video, 0, 0);
      canvas.toBlob((blob) => {
        if (blob) photos = [new File([blob], "photo.jpg", { type: "image/jpeg" })];
        dialog.close();
      }, "image/jpeg", QUALITY);
    };
    const shutter = h("button.primary", { disabled: true, onclick: press }, icon("camera"), "Take it");
    video.addEventListener("loadeddata", () => { shutter.disabled = false; shutter.focus(); });
    const dialog = openDialog("Take a photo", h("div", {}, video, h("div.row", {}, shutter)),
      { look: "viewer" });
    dialog.addEventListener("close", () => {
      for (const track of stream.getTracks()) track.stop();
      resolve(photos);
    });
  });
}
