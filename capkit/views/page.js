"use strict";
// Without this script the page shows everything; with it, a person searches, sorts, filters and hides cells.
const data = JSON.parse(document.getElementById("columns").textContent);
const columns = data.columns, FEW = 20;
const main = document.querySelector("main"), tools = document.getElementById("tools");

let place = 0; // of a caption in every column
const rows = [...main.children].map(element => ({
  element,
  clip: normal(element.querySelector(".name").textContent),
  captions: [...element.querySelectorAll(".caption")].map(caption => ({
    element: caption,
    isError: caption.classList.contains("error"),
    place: place++,
    cell: +caption.parentNode.className.match(/ c(\d+)/)[1],
  })),
}));

function normal(text) {
  return text.replace(/\s+/g, " ").trim().toLowerCase();
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function plural(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function label(text, control) {
  return make("label", {className: "tool"}, text, control);
}

function select(name, options, onchange) {
  const element = make("select", {onchange}, ...options.map(([text, value]) => make("option", {value}, text)));
  element.setAttribute("aria-label", name);
  return element;
}

function isNumeric(column) {
  return column.every(value => value === null || typeof value === "number");
}

// ---- filters: each is a column and what its values must be -----------------------------------------------------------

function addFilter(name = "") {
  const kinds = [["filter by ...", ""], ...Object.keys(columns).sort().map(column => [column, column])];
  const column = select("column", kinds, () => choose(column.value));
  const wanted = make("span", {className: "filter"});
  const remove = make("button", {type: "button", textContent: "×", title: "remove this filter"});
  remove.setAttribute("aria-label", "remove this filter");
  const line = make("fieldset", {className: "filter"}, column, wanted, remove);
  remove.onclick = () => (line.remove(), update());
  line.test = null; // from a caption's place to whether it passes
  column.value = name;

  function choose(name) {
    const values = columns[name];
    line.test = null;
    wanted.replaceChildren();
    if (name && isNumeric(values)) {
      const bounds = ["from", "to"].map(placeholder =>
        make("input", {type: "number", step: "any", placeholder, ariaLabel: `${name} ${placeholder}`}));
      const change = () => {
        const [low, high] = bounds.map(input => input.value === "" ? null : +input.value);
        line.test = low === null && high === null ? null : place =>
          values[place] !== null && (low === null || values[place] >= low) && (high === null || values[place] <= high);
        update();
      };
      bounds.forEach(input => input.oninput = change);
      wanted.append(...bounds);
    } else if (name) {
      const distinct = [...new Set(values)];
      const change = () => {
        const value = control.value, isFew = control.tagName === "SELECT";
        if (isFew) line.test = value === "" ? null : place => String(values[place] ?? "(none)") === value.slice(1);
        else line.test = value === "" ? null : place => normal(String(values[place] ?? "")).includes(normal(value));
        update();
      };
      const options = distinct.map(value => String(value ?? "(none)")).sort().map(value => [value, `=${value}`]);
      const control = distinct.length <= FEW ? select(name, [["any", ""], ...options], change)
        : make("input", {type: "search", placeholder: "contains", oninput: change, ariaLabel: `${name} contains`});
      wanted.append(control);
    }
    update();
  }
  filters.append(line);
  choose(name);
  return column;
}

// ---- controls --------------------------------------------------------------------------------------------------------

const search = make("input", {type: "search", placeholder: "search  ( / )", oninput: update, ariaLabel: "search"});
const filters = make("span", {className: "filter"});
const addButton = make("button", {type: "button", textContent: "+ filter", onclick: () => addFilter().focus()});
const sortBy = select("sort by", [["page order", ""], ...Object.keys(columns).sort().map(name => [name, name])], sort);
const cellNames = data.cells.map((name, cell) => [name, String(cell)]);
const sortCell = select("of cell", [["of any cell", ""], ...cellNames.map(([name, cell]) => [`of ${name}`, cell])], sort);
const descending = make("input", {type: "checkbox", onchange: sort});
const marks = make("input", {type: "checkbox", checked: true, onchange: toggle});
const frames = make("input", {type: "checkbox", checked: true, onchange: toggle});
const boxes = data.cells.map(() => make("input", {type: "checkbox", checked: true, onchange: hideCells}));
const hidden = make("style");
const count = make("output", {ariaLive: "polite"});
const cellsShown = make("summary");

document.head.append(hidden);
tools.append(search, filters, addButton, label("sort", sortBy));
if (boxes.length > 1) tools.append(sortCell);
tools.append(label("largest first", descending));
if (boxes.length > 1) {
  const list = boxes.map((box, cell) => make("label", {className: "tool"}, box, data.cells[cell]));
  tools.append(make("details", {className: "cells"}, cellsShown, make("div", {}, ...list)));
  tools.append(label("differences", marks));
}
tools.append(label("frames", frames), count);

document.addEventListener("keydown", event => {
  if (event.key === "/" && !event.target.matches("input, select")) {
    event.preventDefault();
    search.focus();
  }
  const open = event.key === "Escape" && document.querySelector(".cells[open]");
  if (open) open.open = false;
});

// ---- what they do ----------------------------------------------------------------------------------------------------

function captionText(caption) {
  return caption.text ??= normal([...caption.element.querySelectorAll("p")].map(p => p.textContent).join(" "));
}

function update() {
  const query = normal(search.value);
  const tests = [...filters.children].map(line => line.test).filter(Boolean);
  const isActive = query !== "" || tests.length > 0;
  let numRows = 0, numCaptions = 0, numErrors = 0;
  for (const row of rows) {
    let hits = 0;
    for (const caption of row.captions) {
      const isHit = boxes[caption.cell].checked && tests.every(test => test(caption.place))
        && (query === "" || row.clip.includes(query) || captionText(caption).includes(query));
      caption.element.classList.toggle("hit", isActive && isHit);
      hits += isHit;
      numErrors += isHit && caption.isError;
    }
    row.element.hidden = isActive && !hits;
    numRows += !row.element.hidden;
    numCaptions += hits;
  }
  const shown = `${numRows.toLocaleString("en")} of ${plural(rows.length, "row")}`;
  count.value = `${shown}, ${plural(numCaptions - numErrors, "caption")} and ${plural(numErrors, "error")}`;
}

let isSorted = false;
function sort() {
  const values = columns[sortBy.value], sign = descending.checked ? -1 : 1;
  if (!values && !isSorted) return;
  isSorted = Boolean(values);
  const compare = (a, b) => sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true}));
  const isText = values && !isNumeric(values);
  for (const row of rows) {
    row.key = null; // the first in this order
    for (const caption of row.captions) {
      const value = values && values[caption.place];
      const short = Number.isInteger(value) || isText ? value : value && +value.toPrecision(4);
      const text = (value ?? null) === null ? "" : `${sortBy.value}: ${short}`;
      if (text) caption.element.dataset.value = text; else delete caption.element.dataset.value;
      const isMeant = sortCell.value === "" ? boxes[caption.cell].checked : caption.cell === +sortCell.value;
      if (!text || !isMeant) continue;
      const key = isText ? String(value) : value;
      if (row.key === null || compare(key, row.key) < 0) row.key = key;
    }
  }
  const none = (a, b) => (a.key === null) - (b.key === null);
  const order = values ? [...rows].sort((a, b) => none(a, b) || a.key !== null && compare(a.key, b.key)) : rows;
  main.append(...order.map(row => row.element));
}

function toggle() {
  document.body.classList.toggle("no-marks", !marks.checked);
  document.body.classList.toggle("no-frames", !frames.checked);
}

function hideCells() {
  const numShown = boxes.filter(box => box.checked).length;
  hidden.textContent = boxes.map((box, cell) => box.checked ? "" : `.c${cell} { display: none }`).join(" ");
  document.body.style.setProperty("--cells", Math.max(numShown, 1));
  document.body.classList.toggle("one", numShown === 1);
  cellsShown.textContent = `${numShown} of ${boxes.length} cells`;
  update();
  sort();
}

if (data.filter in columns) addFilter(data.filter);
hideCells();
