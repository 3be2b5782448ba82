"use strict";
// Shows the rows of data.js, some at a time. ROWS has what the page shows of each row of captions.jsonl, in its order;
// ROOTS has, for each number in a row's `root`, the folder as given, and how make_shards.py finds its images:
// --images is `images`, and an image's name in it is `prefix` with the row's `name`, or else `path`, behind.
// Names and captions become text nodes and properties only, never HTML.

const ROWS_PER_PAGE = 100;
const STORED = `captioner ${location.pathname} `;

const [controls, search, filter, sort, shown, grid, pages, previous, page, next, corrected, heading] =
  ["controls", "search", "filter", "sort", "shown", "grid", "pages", "previous", "page", "next", "corrected", "images"]
    .map(id => document.getElementById(id));
const corrections = new Map();  // from `id(row)` to text
let isKept = true;  // whether this browser keeps corrections for the next visit
const changed = new Set();  // `--images` folders with corrections since their last download
let pageIndex = 0;

const FILTERS = {
  all: () => true,
  review: row => row.review !== undefined,
  uncertain: row => (row.review ?? "").includes("low confidence"),
  unlike: row => (row.review ?? "").includes("unlike training data"),
  duplicate: row => row.duplicate_of !== undefined,
  error: row => row.error !== undefined,
  corrected: row => corrections.has(id(row)),
};
const confidence = row => row.confidence ?? Math.exp(row.score);
const score = row => row.score;
const ORDERS = {
  "confidence": rising(confidence),
  "confidence-falling": rising(row => -confidence(row)),
  "score": rising(score),
  "score-falling": rising(row => -score(row)),
  "path": () => 0,
};

/** A comparison for sort(); rows without the measure, which are the errors, come last. */
function rising(measure) {
  const rank = row => row.score === undefined ? Infinity : measure(row);
  return (a, b) => rank(a) < rank(b) ? -1 : Number(rank(a) > rank(b));
}

/** What an image's correction is kept under. */
function id(row) {
  const {images, prefix} = ROOTS[row.root];
  return JSON.stringify([images, prefix + (row.name ?? row.path)]);
}

function place(row) {
  return ROOTS.length === 1 ? row.path : `${ROOTS[row.root].root.replace(/\/$/, "")}/${row.path}`;
}

function caption(row) {
  return corrections.get(id(row)) ?? row.caption;
}

// ---- what is shown ------------------------------------------------------------------------------------------------

function found() {
  const words = search.value.toLowerCase().split(/\s+/);
  return ROWS.filter(row => FILTERS[filter.value](row) && hasAll(row, words)).sort(ORDERS[sort.value]);
}

function hasAll(row, words) {
  const parts = [row.caption, row.alt, row.review, row.error, row.message, corrections.get(id(row)), place(row)];
  const text = parts.concat(row.captions).join(" ").toLowerCase();
  return words.every(word => text.includes(word));
}

function show() {
  const rows = found();
  const numPages = Math.max(1, Math.ceil(rows.length / ROWS_PER_PAGE));
  pageIndex = Math.min(pageIndex, numPages - 1);
  const first = pageIndex * ROWS_PER_PAGE;
  const cards = rows.slice(first, first + ROWS_PER_PAGE).map(card);
  grid.replaceChildren(...cards);
  pages.hidden = numPages === 1;
  previous.disabled = pageIndex === 0;
  next.disabled = pageIndex === numPages - 1;
  page.textContent = `Page ${number(pageIndex + 1)} of ${number(numPages)}`;
  shown.value = describe(first, cards.length, rows.length);
}

function describe(first, numShown, numFound) {
  if (!ROWS.length) return "No files were found, so there is nothing to show.";
  if (!numFound) return `None of ${number(ROWS.length)} files`;
  const range = `${number(first + 1)} to ${number(first + numShown)} of ${number(numFound)}`;
  return numFound === ROWS.length ? range : `${range} found (${number(ROWS.length)} in all)`;
}

function number(value) {
  return value.toLocaleString("en");
}

function turn(numPages) {
  pageIndex += numPages;
  show();
  heading.focus();
}

// ---- one file -----------------------------------------------------------------------------------------------------

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function line(className, ...children) {
  return make("p", {className, dir: "auto"}, ...children);
}

function card(row) {
  const parts = row.error === undefined ? captionParts(row) : [line("alert", row.error), line("", row.message)];
  return make("li", {}, make("figure", {}, frame(row), make("figcaption", {}, ...parts, line("quiet path", place(row)))));
}

function frame(row) {
  const missing = row.error === undefined ? "No preview" : "No caption";
  const image = row.thumbnail
    ? make("img", {loading: "lazy", decoding: "async", alt: row.alt || row.caption, src: `thumbnails/${row.thumbnail}`})
    : make("span", {className: "quiet"}, missing);
  if (!row.link) return make("div", {className: "frame"}, image);
  const ariaLabel = row.thumbnail ? null : `${missing} of ${place(row)}`;
  return make("a", {className: "frame", href: row.link, ariaLabel}, image);
}

function captionParts(row) {
  const scores = `score ${row.score.toFixed(2)}`;
  return [
    ...(row.in_shard ? [line("", row.caption)] : editor(row)),  // make_shards.py reads no image out of a shard
    ...(row.attention ? words(row) : []),
    ...(row.captions ?? []).slice(1).map(other => line("quiet", `or: ${other}`)),
    line("quiet", row.alt ? `alt: ${row.alt}` : "no alt text"),
    ...(row.review === undefined ? [] : [line("alert", row.review)]),
    line("quiet score", row.confidence === undefined ? scores : `confidence ${row.confidence.toFixed(2)}, ${scores}`),
    ...(row.duplicate_of === undefined ? [] : [line("quiet", `same bytes as ${row.duplicate_of}`)]),
  ];
}

// ---- where the model looked ---------------------------------------------------------------------------------------

const KEYS = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity};

/** A toolbar of the caption's words, and the text of the current one, whose heat map lies over the image. */
function words(row) {
  const {words, texts} = row.attention;
  const text = line("quiet seen");
  const buttons = words.map((word, index) =>
    make("button", {type: "button", ariaLabel: texts[index], tabIndex: index ? -1 : 0}, word.trim()));
  const bar = make("div", {className: "words", role: "toolbar", dir: "auto", ariaLabel: `Where the model looked in ${place(row)}`});
  buttons.forEach((button, index) => bar.append(words[index].startsWith(" ") ? " " : "", button));
  const look = index => {
    text.textContent = texts[index] ?? "";
    buttons.forEach((button, other) => button.classList.toggle("current", other === index));
    drawHeat(bar.closest("figure").querySelector(".frame"), row.attention, index);
  };
  const focused = () => buttons.indexOf(document.activeElement);
  buttons.forEach((button, index) => {
    button.addEventListener("pointerenter", () => look(index));
    button.addEventListener("focus", () => {
      buttons.forEach(other => { other.tabIndex = other === button ? 0 : -1; });
      look(index);
    });
    button.addEventListener("blur", () => look(-1));
    button.addEventListener("click", () => button.focus());  // Safari does not focus a clicked button
  });
  bar.addEventListener("pointerleave", () => look(focused()));
  bar.addEventListener("keydown", event => {
    if (event.key === "Escape") look(-1);
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(buttons.length - 1, focused() + KEYS[event.key]))].focus();
  });
  return [bar, text];
}

/** Draws the heat map of a word over the image in a frame; for index -1 removes it. */
function drawHeat(frame, {grid: [rows, columns], area: [left, top, right, bottom], weights}, index) {
  frame.querySelector("canvas")?.remove();
  const image = frame.querySelector("img");
  if (index < 0 || !image) return;
  const cells = rows * columns;
  const map = new ImageData(columns, rows);
  [...atob(weights)].slice(index * cells, (index + 1) * cells)
    .forEach((byte, cell) => map.data.set(heat(byte.charCodeAt(0)), 4 * cell));
  const small = make("canvas", {width: columns, height: rows});
  small.getContext("2d").putImageData(map, 0, 0);
  const [width, height] = [image.naturalWidth, image.naturalHeight];  // object-fit places both alike
  const canvas = make("canvas", {width, height});
  const context = canvas.getContext("2d");
  const seen = [left * width, top * height, (right - left) * width, (bottom - top) * height];
  context.fillStyle = `rgb(0 0 0 / ${heat(0)[3] / 255})`;  // what the model did not see
  context.fillRect(0, 0, width, height);
  context.clearRect(...seen);
  context.drawImage(small, ...seen);
  frame.append(canvas);
}

/** Red, green, blue and opacity of a weight from 0 (dark) to 255 (a clear orange). The report has the same colours. */
function heat(weight) {
  return [weight, 0.55 * weight, 0, 190 - 0.5 * weight];
}

// ---- corrections --------------------------------------------------------------------------------------------------

function editor(row) {
  const field = make("textarea", {rows: 2, dir: "auto", value: caption(row), ariaLabel: `Caption of ${place(row)}`});
  const undo = make("button", {type: "button", ariaLabel: `Undo the correction of ${place(row)}`}, "Undo");
  const original = line("quiet", `was: ${row.caption}`, undo);
  original.hidden = !corrections.has(id(row));
  field.addEventListener("input", () => {
    correct(row, field.value.trim().replace(/\s+/g, " "));
    original.hidden = !corrections.has(id(row));
  });
  field.addEventListener("change", () => { field.value = caption(row); });  // an emptied one has the model's again
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault();
    const fields = [...grid.querySelectorAll("textarea")];
    fields[fields.indexOf(field) + 1]?.focus();
  });
  undo.addEventListener("click", () => {
    correct(row, "");
    original.hidden = true;
    field.value = row.caption;
    field.focus();
  });
  return [field, original];
}

function correct(row, text) {
  const isCorrection = text !== "" && text !== row.caption;
  if (isCorrection) corrections.set(id(row), text);
  else corrections.delete(id(row));
  changed.add(JSON.parse(id(row))[0]);
  try {
    if (isCorrection) localStorage.setItem(STORED + id(row), text);
    else localStorage.removeItem(STORED + id(row));
  } catch {
    isKept = false;  // full, or forbidden for pages on disk
  }
  countCorrections();
}

function loadCorrections() {
  try {
    for (const row of ROWS) {
      const text = localStorage.getItem(STORED + id(row));
      if (text !== null) corrections.set(id(row), text);
    }
  } catch {
    isKept = false;
  }
  countCorrections();
}

function countCorrections() {
  corrected.value = `${number(corrections.size)} corrected`;
  corrected.parentElement.hidden = corrections.size === 0;
}

function addDownloadButtons() {
  const folders = new Set(ROOTS.map(root => root.images));
  for (const images of folders) {
    const button = make("button", {type: "button"}, "Download corrections.jsonl");
    button.addEventListener("click", () => download(images));
    corrected.parentElement.append(button, line("quiet", `for make_shards.py --images ${images}`));
  }
}

function download(wanted) {
  const lines = [...corrections]
    .map(([id, text]) => [...JSON.parse(id), text])
    .filter(([images]) => images === wanted)
    .map(([, path, text]) => JSON.stringify({path, captions: [text]}) + "\n");
  make("a", {href: URL.createObjectURL(new Blob(lines)), download: "corrections.jsonl"}).click();
  changed.delete(wanted);
}

// ---- start --------------------------------------------------------------------------------------------------------

function start() {
  loadCorrections();
  addDownloadButtons();
  for (const option of filter.options) {
    if (option.value !== "corrected") option.append(` (${number(ROWS.filter(FILTERS[option.value]).length)})`);
  }
  for (const control of [search, filter, sort]) {
    control.addEventListener("input", () => { pageIndex = 0; show(); });
  }
  controls.addEventListener("submit", event => event.preventDefault());
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  addEventListener("beforeunload", event => {
    if (!isKept && changed.size && corrections.size) event.preventDefault();
  });
  controls.hidden = ROWS.length === 0;
  show();
}

if (typeof ROWS === "undefined") shown.value = "There is no data.js beside this page: copy the whole folder.";
else start();
