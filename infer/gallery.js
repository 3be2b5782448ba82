"use strict";
// Shows the rows of data.js, some at a time. ROWS has what the page shows of each row of captions.jsonl, in its order;
// ROOTS has, for each number in a row's `root`, the folder as given, and how make_shards.py finds its images:
// --images is `images`, and an image's name in it is `prefix` with the row's `name`, or else `path`, behind.
// A row's `correction` is what a person wrote before the page was made; "" means decorative. infer/serve.py has newer ones.
// Names and captions become text nodes and properties only, never HTML.

const ROWS_PER_PAGE = 100;
const STORED = `captioner corrections ${location.pathname} `;
const SAVED_AT = "corrections";  // beside this page, if infer/serve.py serves it
const MILLISECONDS_UNTIL_SAVED = 300;
const MILLISECONDS_UNTIL_RETRY = 5000;
const DECORATIVE = "";

const [controls, search, filter, sort, shown, grid, pages, previous, page, next, corrected, saved, undo, heading] =
  ["controls", "search", "filter", "sort", "shown", "grid", "pages", "previous", "page", "next", "corrected", "saved", "undo", "images"]
    .map(id => document.getElementById(id));
const corrections = new Map();  // from `id(row)` to a person's text, or DECORATIVE
const onDisk = new Map();  // those that corrections.jsonl has
const rowsById = new Map();
const refreshers = new Map();  // from `id(row)` of the shown cards to a function that shows the row's correction
const steps = [];  // for undo: {key, before}, the latest last
let isUsed = false;  // whether a correction was made or taken back since the page was opened
let isServed = false;  // whether infer/serve.py saves corrections
let saving = 0;  // the timer that saves next, or 0
let isAnswered = true;  // whether the last request to save was
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
  corrected: row => Boolean(corrections.get(id(row))),
  decorative: row => corrections.get(id(row)) === DECORATIVE,
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
  return corrections.get(id(row)) || row.caption;
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
  refreshers.clear();
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
    ? make("img", {loading: "lazy", decoding: "async", alt: corrections.get(id(row)) || row.alt || row.caption, src: `thumbnails/${row.thumbnail}`})
    : make("span", {className: "quiet"}, missing);
  if (!row.link || isServed) return make("div", {className: "frame"}, image);
  const ariaLabel = row.thumbnail ? null : `${missing} of ${place(row)}`;
  return make("a", {className: "frame", href: row.link, ariaLabel}, image);
}

function captionParts(row) {
  const scores = `score ${row.score.toFixed(2)}`;
  const alt = line("quiet", row.alt ? `alt: ${row.alt}` : "no alt text");
  const {caption, decorative} = row.in_shard ? readOnly(row) : editor(row, alt);
  return [
    ...caption,
    ...(row.attention ? words(row) : []),
    ...(row.captions ?? []).slice(1).map(other => line("quiet", `or: ${other}`)),
    alt,
    ...(row.review === undefined ? [] : [line("alert", row.review)]),
    line("quiet score", row.confidence === undefined ? scores : `confidence ${row.confidence.toFixed(2)}, ${scores}`),
    ...(row.duplicate_of === undefined ? [] : [line("quiet", `same bytes as ${row.duplicate_of}`)]),
    ...decorative,
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

/** The field with the caption, what the model said, and the box for decorative images. `alt` is the line with the alt text. */
function editor(row, alt) {
  const key = id(row);
  const field = make("textarea", {rows: 2, dir: "auto", ariaLabel: `Caption of ${place(row)}`});
  const reset = make("button", {type: "button", ariaLabel: `Reset the caption of ${place(row)} to the model's`}, "Reset");
  const original = line("quiet", `was: ${row.caption}`, reset);
  const box = make("input", {type: "checkbox", ariaLabel: `Decorative: ${place(row)}`});
  const refresh = () => {
    const text = corrections.get(key);
    box.checked = text === DECORATIVE;
    field.disabled = box.checked;
    original.hidden = !text;
    const own = text ?? row.alt;
    alt.textContent = own ? `alt: ${own}` : box.checked ? "empty alt text" : "no alt text";
  };
  const refreshAll = () => {
    refresh();
    field.value = caption(row);
  };
  let kind = "";  // of the last input: what is typed is one step, up to a space
  field.addEventListener("input", event => {
    const text = field.value.trim().replace(/\s+/g, " ");
    const goesOn = event.inputType === kind && !/\s/.test(event.data ?? "") && steps.at(-1)?.key === key;
    kind = event.inputType;
    correct(key, text === "" || text === row.caption ? null : text, {goesOn});
    refresh();
  });
  field.addEventListener("blur", () => { kind = ""; });
  field.addEventListener("change", () => { field.value = caption(row); });  // an emptied one has the model's again
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault();
    const fields = [...grid.querySelectorAll("textarea:enabled")];
    fields[fields.indexOf(field) + 1]?.focus();
  });
  box.addEventListener("change", () => {
    correct(key, box.checked ? DECORATIVE : null);
    refreshAll();
  });
  reset.addEventListener("click", () => {
    correct(key, null);
    refreshAll();
    field.focus();
  });
  refreshers.set(key, () => {
    refreshAll();
    (box.checked ? box : field).focus();
  });
  refreshAll();
  return {caption: [field, original], decorative: [make("label", {className: "check"}, box, " Decorative")]};
}

/** The caption of an image in a shard, out of which make_shards.py reads none. */
function readOnly(row) {
  return {caption: [line("", row.caption)], decorative: []};
}

/** Changes a row's correction; null is none. With `goesOn` undo takes it back together with the step before. */
function correct(key, text, {goesOn = false} = {}) {
  const before = corrections.get(key) ?? null;
  if (text === before) return;
  if (!goesOn) steps.push({key, before});
  setCorrection(key, text);
}

function setCorrection(key, text) {
  if (text === null) corrections.delete(key);
  else corrections.set(key, text);
  changed.add(JSON.parse(key)[0]);
  isUsed = true;
  keep(key);
  if (isServed) saveIn(MILLISECONDS_UNTIL_SAVED);
  countCorrections();
}

function undoStep() {
  const step = steps.pop();
  if (!step) return;
  setCorrection(step.key, step.before);
  refreshers.get(step.key)?.();
  saved.value = `Undone: ${place(rowsById.get(step.key))}`;
}

function countCorrections() {
  const numDecorative = [...corrections.values()].filter(text => text === DECORATIVE).length;
  const parts = [`${number(corrections.size - numDecorative)} corrected`];
  if (numDecorative) parts.push(`${number(numDecorative)} decorative`);
  corrected.value = parts.join(", ");
  corrected.parentElement.hidden = corrections.size === 0 && !isUsed;
  undo.hidden = steps.length === 0;
  saved.value = whereSaved();
}

function whereSaved() {
  const where = isKept ? "kept in this browser" : "not kept: download them before you leave";
  if (!isServed) return where;
  if (!unsaved().length) return "saved in corrections.jsonl";
  return isAnswered ? "saving" : `not saved, as the server does not answer: ${where}`;
}

// ---- where corrections are kept -----------------------------------------------------------------------------------

/** Whether corrections.jsonl has what is on the page. */
function isSaved(key) {
  return (corrections.get(key) ?? null) === (onDisk.get(key) ?? null);
}

function unsaved() {
  return [...new Set([...corrections.keys(), ...onDisk.keys()])].filter(key => rowsById.has(key) && !isSaved(key));
}

/** Keeps in this browser what corrections.jsonl does not have. */
function keep(key) {
  try {
    if (isSaved(key)) localStorage.removeItem(STORED + key);
    else localStorage.setItem(STORED + key, JSON.stringify(corrections.get(key) ?? null));
  } catch {
    isKept = false;  // full, or forbidden for pages on disk
  }
}

function loadKept() {
  for (const [key, text] of onDisk) if (rowsById.has(key)) corrections.set(key, text);
  try {
    for (const key of rowsById.keys()) {
      const kept = localStorage.getItem(STORED + key);
      if (kept === null) continue;
      const text = JSON.parse(kept);
      if (text === null) corrections.delete(key);
      else corrections.set(key, text);
      keep(key);
    }
  } catch {
    isKept = false;
  }
}

/** A line of corrections.jsonl; for none, the one that takes it back. */
function toLine(key) {
  const [images, path] = JSON.parse(key);
  const text = corrections.get(key);
  const said = text === undefined ? {} : text === DECORATIVE ? {decorative: true} : {captions: [text]};
  return {path, ...said, images, sha256: rowsById.get(key).sha256};
}

/** Takes the corrections from infer/serve.py, if that serves this page; else it is on disk, or on a server of files. */
async function loadServed() {
  const answer = await fetch(SAVED_AT).catch(() => null);
  if (!answer?.ok) return;
  isServed = true;
  onDisk.clear();
  for (const line of await answer.json()) {
    onDisk.set(JSON.stringify([line.images, line.path]), line.decorative ? DECORATIVE : line.captions[0]);
  }
}

function saveIn(milliseconds) {
  saving ||= setTimeout(save, milliseconds);
}

async function save() {
  const sent = new Map(unsaved().map(key => [key, corrections.get(key)]));
  const body = JSON.stringify([...sent.keys()].map(toLine));
  const headers = {"Content-Type": "application/json"};
  const answer = await fetch(SAVED_AT, {method: "PUT", body, headers}).catch(() => null);
  isAnswered = Boolean(answer?.ok);
  if (isAnswered) {
    for (const [key, text] of sent) {
      if (text === undefined) onDisk.delete(key);
      else onDisk.set(key, text);
      keep(key);
    }
  }
  saving = 0;
  if (unsaved().length) saveIn(isAnswered ? MILLISECONDS_UNTIL_SAVED : MILLISECONDS_UNTIL_RETRY);
  saved.value = whereSaved();
}

function addDownloadButtons() {
  const folders = new Set(ROOTS.map(root => root.images));
  for (const images of folders) {
    const button = make("button", {type: "button"}, "Download corrections.jsonl");
    button.addEventListener("click", () => download(images));
    undo.before(button, line("quiet", `for make_shards.py --images ${images}`));
  }
}

function download(wanted) {
  const lines = [...corrections.keys()].map(toLine).filter(({images}) => images === wanted);
  const content = new Blob(lines.map(line => JSON.stringify(line) + "\n"));
  make("a", {href: URL.createObjectURL(content), download: "corrections.jsonl"}).click();
  changed.delete(wanted);
}

// ---- start --------------------------------------------------------------------------------------------------------

function start() {
  loadKept();
  if (isServed && unsaved().length) saveIn(MILLISECONDS_UNTIL_SAVED);
  countCorrections();
  addDownloadButtons();
  for (const option of filter.options) {
    if (!["corrected", "decorative"].includes(option.value)) option.append(` (${number(ROWS.filter(FILTERS[option.value]).length)})`);
  }
  for (const control of [search, filter, sort]) {
    control.addEventListener("input", () => { pageIndex = 0; show(); });
  }
  controls.addEventListener("submit", event => event.preventDefault());
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  undo.addEventListener("click", undoStep);
  addEventListener("keydown", event => {
    const isUndo = (event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "z";
    if (!isUndo || event.target === search) return;
    event.preventDefault();  // the browser's own would undo what was typed into any field
    undoStep();
  });
  addEventListener("beforeunload", event => {
    if (!isKept && changed.size && corrections.size) event.preventDefault();
  });
  controls.hidden = ROWS.length === 0;
  show();
}

function startWithRows() {
  for (const row of ROWS) {
    rowsById.set(id(row), row);
    if (row.correction !== undefined) onDisk.set(id(row), row.correction);
  }
  if (location.protocol === "file:") start();
  else loadServed().then(start);
}

if (typeof ROWS === "undefined") shown.value = "There is no data.js beside this page: copy the whole folder.";
else startWithRows();
