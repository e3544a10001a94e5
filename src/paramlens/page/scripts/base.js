"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const opened = new Map();

/** The parts of one site: unpacked at the first call, kept after it. */
function partsOf(site) {
  if (!opened.has(site)) opened.set(site, unpack(document.getElementById(`site-${site}`).textContent));
  return opened.get(site);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const html = (tag, attributes = {}, ...children) => made(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => made(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

const shortName = (site) => site.replace(/^(transformer|model|gpt_neox)\./, "");
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function channels(colour) {
  return [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
}

const STOPS = [[0, "empty"], [0.15, "low"], [0.5, "mid"], [1, "full"]];

/** The colour of a share in [0, 1], and whether text on it must be light. */
function shade(share) {
  const value = Math.min(1, Math.max(0, share));
  const end = Math.max(1, STOPS.findIndex(([stop]) => stop >= value));
  const [[from, start], [to, finish]] = [STOPS[end - 1], STOPS[end]];
  const [a, b] = [channels(variable(start)), channels(variable(finish))];
  const rgb = a.map((channel, i) => Math.round(channel + ((b[i] - channel) * (value - from)) / (to - from)));
  const bright = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255;
  return { fill: `rgb(${rgb})`, text: bright > 0.55 ? "#1c2430" : "#ffffff" };
}

function table(columns, rows) {
  const head = html("tr", {}, ...columns.map((column) => html("th", { scope: "col" }, column)));
  const body = rows.map((row) => html("tr", {}, ...row.map((cell) => html("td", {}, typeof cell === "number" ? number(cell) : cell))));
  return html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" }, html("table", {}, html("thead", {}, head), html("tbody", {}, ...body)));
}

const MOST_ROWS = 500;

/** A closed element whose table is made when it is opened. */
function tableLater(columns, rows) {
  const details = html("details", { class: "as-table" }, html("summary", {}, "as a table"));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    const all = rows();
    if (all.length > MOST_ROWS) details.append(html("p", {}, `The first ${MOST_ROWS} of ${all.length} rows; the CSV file has all of them.`));
    details.append(table(columns, all.slice(0, MOST_ROWS)));
  });
  return details;
}

function save(name, content, type) {
  const link = html("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csv(columns, rows) {
  const cell = (value) => (/[",\n\r]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

/** Buttons that save a picture (`picture(format)` gives a data address) and its data. */
function tools(name, picture, columns, rows) {
  const button = (label, action) => html("button", { type: "button", "aria-label": `${label} of ${name}`, "data-save": label, onclick: action }, label);
  const savePicture = (format) => async () => save(`${name}.${format}`, await (await picture(format)), format === "svg" ? "image/svg+xml" : "image/png");
  return html("div", { class: "controls tools" }, button("SVG", savePicture("svg")), button("PNG", savePicture("png")), button("CSV", () => save(`${name}.csv`, csv(columns, rows()), "text/csv")));
}

/** What tokens may hold and XML may not: control characters and halves of a letter. */
const NOT_XML = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|\p{Surrogate}/gu;

/** An SVG element of this page as a file: a whole document, or twice its size in pixels. */
async function asFile(element, format) {
  const copy = element.cloneNode(true);
  const [width, height] = [element.viewBox.baseVal.width, element.viewBox.baseVal.height];
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.prepend(svg("style", {}, "text{font:12px system-ui,sans-serif}"), svg("rect", { width: "100%", height: "100%", fill: variable("paper") }));
  const text = new XMLSerializer().serializeToString(copy).replace(NOT_XML, "\ufffd");
  if (format === "svg") return text;
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = html("canvas", { width: 2 * width, height: 2 * height });
  canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}
