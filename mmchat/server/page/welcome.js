// The empty page: what can be done here, shown by pictures that the built-in model knows.

import { h } from "./dom.js";

const EXAMPLES = [
  ["dog.jpg", "What is this?"],
  ["street.jpg", "Describe this picture."],
  ["fish.jpg", "How many fish are there?"],
  ["sign.jpg", "What does the text say?"],
];

/** ask(file, question) is called with the example that was chosen. */
export function welcome(ask) {
  const cards = EXAMPLES.map(([name, question]) => {
    const address = new URL(`samples/${name}`, import.meta.url);
    const choose = async () => {
      const blob = await (await fetch(address)).blob();
      ask(new File([blob], name, { type: "image/jpeg" }), question);
    };
    return h("li", {}, h("button.card", { onclick: choose },
      h("span.card-picture", {}, h("img", { src: address.href, alt: "" })),
      h("span.card-question", {}, question)));
  });
  return [
    h("div.backdrop-tiles", { "aria-hidden": "true" }),
    h("p.display", {}, "Show me something."),
    h("p.lede", {}, "Drop a picture, paste one, or take a photo, and ask about it. "
      + "It goes to your own server and nowhere else."),
    h("ul.cards", { "aria-label": "Examples" }, ...cards),
  ];
}
