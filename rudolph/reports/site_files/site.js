"use strict";
// Sorting and filtering of tables, search, and zoom.  Pages are opened from disk, where neither
// fetch nor modules work, so the search index is a script.

const ROOT = document.currentScript.dataset.root;
const FILTERED_ROWS = 8;  // shorter tables have no filters
const SHOWN_ROWS = 500;  // layout of more rows takes seconds; filters and sorting reach the others
const NUMBER = /^[-+]?\d[\d,]*\.?\d*(e[-+]?\d+)?(?=$|[\s%])/i;

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const textOf = (row, column) => row.cells[column].textContent.trim();
const numberOf = (text) => {
  const match = NUMBER.exec(text);
  return match && Number(match[0].replaceAll(",", ""));
};

function compareTexts(first, second) {
  const [a, b] = [numberOf(first), numberOf(second)];
  return a !== null && b !== null ? a - b : first.localeCompare(second, "en", {numeric: true});
}

function sortBy(table, header) {
  const column = header.cellIndex, body = table.tBodies[0];
  const direction = header.ariaSort === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
  header.ariaSort = direction === 1 ? "ascending" : "descending";
  const keyed = [...body.rows].map((row) => [textOf(row, column), row]);
  // Empty cells stay last in both directions.
  keyed.sort(([a], [b]) => (a === "") - (b === "") || direction * compareTexts(a, b));
  body.append(...keyed.map(([, row]) => row));
  table.dispatchEvent(new Event("sorted"));
}

// The first folder of the page that a row links to.
const folderOf = (row) => {
  const href = row.cells[0].querySelector("a")?.getAttribute("href") ?? "";
  return /^[\w-]+\//.test(href) ? href.split("/")[0] : "";
};

function selectOf(name, rows, valueOf) {
  const values = rows.map(valueOf), distinct = [...new Set(values)];
  const isUseful = distinct.length > 1 && distinct.length <= Math.min(100, rows.length / 4);
  const isText = distinct.every((value) => value.length <= 60) && distinct.some((value) => numberOf(value) === null);
  if (!isUseful || !isText) return null;
  const options = distinct.sort(compareTexts).map((value) => element("option", {value}, value || "(empty)"));
  const every = element("option", {value: "\0"}, `${name}: all`);
  const select = element("select", {ariaLabel: `Filter by ${name}`}, every, ...options);
  return {select, allows: (row) => select.value === "\0" || valueOf(row) === select.value};
}

function addFilters(table) {
  const rows = [...table.tBodies[0].rows];
  const columns = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const selects = [
    selectOf("folder", rows, folderOf),
    ...columns.map((name, column) => selectOf(name, rows, (row) => textOf(row, column))),
  ].filter(Boolean);
  const input = element("input", {type: "search", placeholder: "Filter rows", ariaLabel: "Filter rows"});
  const count = element("output");
  const bar = element("div", {className: "filters"}, input, ...selects.map(({select}) => select), count);
  const update = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let matches = 0;
    for (const row of table.tBodies[0].rows) {
      const text = words.length ? row.textContent.toLowerCase() : "";
      const isMatch = words.every((word) => text.includes(word)) && selects.every(({allows}) => allows(row));
      matches += isMatch;
      row.hidden = !isMatch || matches > SHOWN_ROWS;
    }
    const shown = matches > SHOWN_ROWS ? `, the first ${SHOWN_ROWS} are shown` : "";
    count.textContent = `${matches} of ${rows.length} rows${shown}`;
  };
  bar.addEventListener("input", update);
  table.addEventListener("sorted", update);
  update();
  table.parentElement.before(bar);
}

for (const table of document.querySelectorAll("table")) {
  for (const header of table.tHead.rows[0].cells) {
    header.replaceChildren(element("button", {type: "button", onclick: () => sortBy(table, header)}, ...header.childNodes));
  }
  if (table.tBodies[0]?.rows.length >= FILTERED_ROWS) addFilters(table);
}

// Search: pages that contain every word, those with a word in the title first.
const search = document.getElementById("search"), found = document.getElementById("found");
let pages = null;

function showFound() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (!pages || !words.length) return void (found.hidden = true);
  const matches = [];
  for (const page of pages) {
    const title = page.title.toLowerCase(), text = page.text.toLowerCase();
    if (!words.every((word) => title.includes(word) || text.includes(word))) continue;
    matches.push({page, rank: words.filter((word) => title.includes(word)).length, at: text.indexOf(words[0])});
  }
  matches.sort((a, b) => b.rank - a.rank);
  found.replaceChildren(...matches.map(({page, at}) => element("li", {},
    element("a", {href: ROOT + page.url}, page.title),
    element("small", {}, at < 0 ? "" : `… ${page.text.slice(Math.max(0, at - 60), at + 120)} …`))));
  if (!matches.length) found.replaceChildren(element("li", {}, "No page has all these words."));
  found.hidden = false;
}

search?.addEventListener("focus", () => {
  const script = element("script", {src: `${ROOT}search.js`, onload: () => { pages = SEARCH_INDEX; showFound(); }});
  if (!pages) document.head.append(script);
}, {once: true});
search?.addEventListener("input", showFound);
search?.addEventListener("keydown", (event) => {
  if (event.key === "Enter") found.querySelector("a")?.click();
  if (event.key === "Escape") found.hidden = true;
});
document.addEventListener("click", (event) => {
  if (found && !event.target.closest("search")) found.hidden = true;
});

// Zoom: an image opens in a dialog that scrolls; without scripts its link opens the file.
function openImage(link) {
  const image = element("img", {src: link.href, alt: link.querySelector("img").alt});
  let scale = 1;
  const zoom = (factor) => {
    scale = Math.min(16, Math.max(1, scale * factor));
    image.style.width = `${scale * fitted}px`;
  };
  const button = (text, ariaLabel, onclick) => element("button", {type: "button", ariaLabel, onclick}, text);
  const view = element("div", {}, image);
  const dialog = element("dialog", {ariaLabel: image.alt}, view, element("p", {},
    button("−", "Zoom out", () => zoom(1 / 1.5)), button("+", "Zoom in", () => zoom(1.5)),
    button("×", "Close", () => dialog.close())));
  let fitted = 0;
  image.onload = () => {
    const {naturalWidth: width, naturalHeight: height} = image;
    fitted = Math.min(view.clientWidth, view.clientHeight * width / height);
    zoom(1);
  };
  view.onwheel = (event) => {
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2);
    }
  };
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
}

for (const link of document.querySelectorAll("a.zoom")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    openImage(link);
  });
}
