// Markdown as nodes of the document. markdown-it reads the text (`html` off), and its tokens are
// rendered here by createElement and text nodes: what a model writes cannot become code, load a
// picture or hide where a link goes.

import { copy, h, iconButton } from "./dom.js";

const reader = globalThis.markdownit({ html: false, linkify: false, typographer: false });
const TAGS = new Set(["p", "ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th", "td",
  "em", "strong", "s"]);
const DEEPEST_HEADING = 6;

/** Appends `text`, rendered, to `parent`. */
export function render(parent, text) {
  fill(parent, reader.parse(text, {}));
}

function fill(parent, tokens) {
  const open = [parent];
  for (const token of tokens) {
    const into = open.at(-1);
    if (token.type === "inline") fill(into, token.children);
    else if (token.nesting < 0) close(open, token);
    else if (token.nesting > 0) open.push(opened(into, token));
    else into.append(...leaf(token));
  }
}

function opened(into, token) {
  if (token.hidden) return into; // the paragraphs of a tight list
  let element;
  if (token.type === "heading_open") {
    const level = Math.min(Number(token.tag.slice(1)) + 2, DEEPEST_HEADING); // below the page's own
    element = h(`h${level}`);
  } else if (token.type === "link_open") {
    element = link(token.attrGet("href") ?? "");
  } else {
    element = h(TAGS.has(token.tag) ? token.tag : "span");
  }
  if (token.tag === "ol" && token.attrGet("start")) element.start = Number(token.attrGet("start"));
  const align = /text-align:(\w+)/.exec(token.attrGet("style") ?? "");
  if (align) element.classList.add(`align-${align[1]}`);
  if (token.tag !== "table") into.append(element);
  else into.append(h("div.table", { tabindex: "0", role: "region", "aria-label": "Table" }, element));
  return element;
}

function close(open, token) {
  const element = open.pop();
  if (token.type !== "link_close" || !element.dataset.address) return;
  const address = element.dataset.address;
  if (element.textContent !== address) element.after(h("span.address", {}, ` (${address})`));
}

/** Only http and https lead anywhere. */
function link(address) {
  if (!/^https?:\/\//i.test(address)) return h("span");
  const made = h("a", { href: address, rel: "noopener noreferrer", target: "_blank" });
  made.dataset.address = address;
  return made;
}

function leaf(token) {
  switch (token.type) {
    case "code_inline":
      return [h("code", {}, token.content)];
    case "fence":
    case "code_block":
      return [codeBlock(token.content, (token.info ?? "").trim().split(/\s+/)[0])];
    case "hr":
      return [h("hr")];
    case "hardbreak":
      return [h("br")];
    case "softbreak":
      return ["\n"];
    case "image": // never loaded: its address would tell somebody that this was read
      return [h("span.unloaded", {}, `[picture: ${token.content}] (${token.attrGet("src")})`)];
    default:
      return [token.content];
  }
}

export function codeBlock(code, language = "") {
  const text = h("code", {}, code);
  const button = iconButton("copy", "Copy the code", () => copy(text.textContent));
  const name = language.slice(0, 24) || "text";
  return h("div.code", {}, h("div.code-head", {}, h("span", {}, name), button),
    h("pre", { tabindex: "0", role: "region", "aria-label": `Code, ${name}` }, text));
}

/** Markdown that grows: blocks that have ended stay as they are, only the last is read again. */
export class GrowingMarkdown {
  constructor(parent) {
    this.parent = parent;
    this.open = h("div.open-block");
    parent.replaceChildren(this.open);
    this.start = 0; // where the open block begins in the text
    this.length = 0;
  }

  update(text) {
    if (text.length === this.length) return;
    this.length = text.length;
    const rest = text.slice(this.start);
    const tokens = reader.parse(rest, {});
    const tops = tokens.filter((token) => token.level === 0 && token.map && token.nesting >= 0);
    const last = tops.at(-1);
    let keep = 0;
    if (tops.length > 1 && last.map[0] > 0) {
      keep = tokens.indexOf(last);
      const closed = document.createDocumentFragment();
      fill(closed, tokens.slice(0, keep));
      this.open.before(closed);
      this.start += lineStart(rest, last.map[0]);
    }
    const fresh = document.createDocumentFragment();
    fill(fresh, tokens.slice(keep));
    match(this.open, fresh);
  }
}

/** Makes `old` like `fresh`, and leaves alone what is alike: that keeps its layout and selection. */
function match(old, fresh) {
  const wanted = [...fresh.childNodes];
  for (const [n, node] of wanted.entries()) {
    const there = old.childNodes[n];
    if (!there) old.append(node);
    else if (there.isEqualNode(node)) continue;
    else if (there.cloneNode().isEqualNode(node.cloneNode())) match(there, node);
    else there.replaceWith(node);
  }
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

function lineStart(text, line) {
  let at = 0;
  for (let n = 0; n < line; n += 1) at = text.indexOf("\n", at) + 1;
  return at;
}
