"use strict";
// Sends dropped, pasted or chosen images to /caption, some at a time, and shows each with its caption.
// Names and captions become text nodes and properties only, never HTML.

const REQUESTS_AT_ONCE = 4;

const [zone, files, status, grid, log] = ["zone", "files", "status", "grid", "log"].map(id => document.getElementById(id));
const maxBytes = Number(zone.dataset.maxBytes);
const waiting = [];
let numRunning = 0;
let numDone = 0;

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function line(className, text) {
  return make("p", {className, dir: "auto"}, text);
}

function add(added) {
  for (const file of added) {
    const card = makeCard(file);
    grid.append(card.item);
    waiting.push({file, ...card});
  }
  startNext();
}

function makeCard(file) {
  const image = make("img", {alt: "", src: URL.createObjectURL(file)});
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  image.addEventListener("error", () => image.replaceWith(make("span", {className: "quiet"}, "No preview")));
  const text = make("div", {}, line("quiet", "waiting"));
  const parts = make("figcaption", {}, text, line("quiet path", file.name));
  return {image, text, item: make("li", {}, make("figure", {}, make("div", {className: "frame"}, image), parts))};
}

function startNext() {
  while (numRunning < REQUESTS_AT_ONCE && waiting.length) {
    const next = waiting.shift();
    numRunning += 1;
    caption(next.file).then(row => {
      show(next, row);
      numRunning -= 1;
      numDone += 1;
      startNext();
    });
  }
  status.value = `${numDone} of ${numDone + numRunning + waiting.length} done`;
}

/** The row of a file, or an object with `error` and `message` too. */
async function caption(file) {
  if (file.size > maxBytes) {
    return {error: "too large", message: `more than ${maxBytes.toLocaleString("en")} bytes: shrink it`};
  }
  const body = new FormData();
  body.append("image", file);
  try {
    for (;;) {
      const answer = await fetch("caption", {method: "POST", body});
      const content = await answer.json();
      if (answer.status !== 429) return answer.ok ? content[0] : content;
      await new Promise(resolve => setTimeout(resolve, 1000 * Number(answer.headers.get("Retry-After"))));
    }
  } catch {
    return {error: "no answer", message: "the server does not answer, or the file cannot be read: start it, add it again"};
  }
}

function show({file, image, text}, row) {
  if (row.error !== undefined) {
    text.replaceChildren(line("alert", row.error), line("", row.message));
    log.append(line("", `${file.name}: no caption, ${row.error}: ${row.message}`));
    return;
  }
  image.alt = row.alt || row.caption;
  const copy = make("button", {type: "button", ariaLabel: `Copy the caption of ${file.name}`}, "Copy");
  copy.addEventListener("click", () => {
    navigator.clipboard.writeText(image.alt).then(() => { status.value = `Copied: ${image.alt}`; });
  });
  text.replaceChildren(line("", row.alt || row.caption));
  if (navigator.clipboard) text.append(copy);  // on this machine, or over https
  if (row.review) text.append(line("alert", row.review));
  log.append(line("", `${file.name}: ${image.alt}`));
}

files.addEventListener("change", () => {
  add(files.files);
  files.value = "";  // so that the same file can be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, event => {
    event.preventDefault();  // or the browser would open the file
    zone.classList.add("over");
  });
}
addEventListener("dragleave", event => zone.classList.toggle("over", event.relatedTarget !== null));
addEventListener("drop", event => {
  event.preventDefault();
  zone.classList.remove("over");
  add(event.dataTransfer.files);
});
addEventListener("paste", event => add(event.clipboardData.files));
