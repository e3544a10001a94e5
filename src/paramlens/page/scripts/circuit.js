/** Sites as nodes in model order; an edge is what the later site loses without the earlier one's active subcomponents. */
const circuitState = { measure: 0, least: 0.1, chosen: null };
const WIDEST = 240; // of a node, in pixels; a longer name is cut at its start, as in the map
const MEASURES = ["inner activation", "importance"];

/** Blocks down the page in model order, a block's sites side by side; the output last. */
function layout() {
  const blocks = [...new Set(DATA.sites.map((site) => site.place[0] || site.name))];
  const rows = blocks.map((block) => DATA.sites.flatMap((site, i) => ((site.place[0] || site.name) === block ? [i] : [])));
  const most = Math.max(...rows.map((row) => row.length));
  const room = document.getElementById("circuit-figure").clientWidth;
  const [wide, tall] = [Math.min(WIDEST, Math.max(104, 16 + 7 * Math.max(...DATA.sites.map((site) => site.place[1].length)))), 44];
  const gap = Math.min(150, Math.max(26, (room - 120) / most - wide));
  const width = most * (wide + gap) + 120;
  const places = [];
  rows.forEach((row, r) => row.forEach((site, k) => {
    const bend = row.length > 2 ? 14 * (k % 2) : 0;
    places[site] = { x: 110 + (k + (most - row.length) / 2) * (wide + gap) + gap / 2, y: 14 + r * 128 + bend };
  }));
  const output = { x: (width - wide + 110) / 2, y: 14 + rows.length * 128 };
  return { blocks, rows, places, output, wide, tall, width, height: output.y + tall + 12 };
}

function drawCircuit() {
  const { blocks, rows, places, output, wide, tall, width, height } = layout();
  const measure = circuitState.measure, chosen = circuitState.chosen;
  const colour = variable("mid"), soft = variable("soft"), ink = variable("ink");
  const largest = Math.max(1e-9, ...DATA.sites.map((site) => site.removed ?? 0));
  const parts = [];
  const arrow = (from, to, share, text, { dashed = false, faint = false } = {}) => {
    const [x1, y1, x2] = [from.x + wide / 2, from.y + tall, to.x + wide / 2];
    const beside = to.y < y1 + 10; // in the same block: from below to below
    const y2 = beside ? to.y + tall : to.y;
    const [bend1, bend2] = beside ? [y1 + 46, y2 + 46] : [(y1 + y2) / 2, (y1 + y2) / 2];
    const path = `M${x1} ${y1} C${x1} ${bend1} ${x2} ${bend2} ${x2} ${y2}`;
    const size = Math.min(1, Math.max(0, share));
    parts.push(svg("path", { class: "edge", d: path, fill: "none", stroke: dashed ? soft : colour, "stroke-width": 1 + 5 * size, opacity: faint ? 0.08 : 0.3 + 0.6 * size, "stroke-dasharray": dashed ? "5 4" : null }, svg("title", {}, text)));
  };
  DATA.sites.forEach((site, i) => {
    if (site.removed !== null && site.removed / largest >= circuitState.least) arrow(places[i], output, site.removed / largest, `${site.name} removed: output KL ${number(site.removed)} nats`, { dashed: true, faint: chosen !== null && chosen !== i });
  });
  shownEdges().forEach(([source, target, ...values]) => arrow(places[source], places[target], values[measure], `${DATA.sites[source].name} → ${DATA.sites[target].name}: ${number(values[measure])} of ${MEASURES[measure]}`, { faint: chosen !== null && chosen !== source && chosen !== target }));
  rows.forEach((row, r) => parts.push(svg("text", { x: 4, y: 14 + r * 128 + 26, fill: soft }, shortName(blocks[r]).slice(0, 15))));
  DATA.sites.forEach((site, i) => parts.push(node(i, places[i], wide, tall)));
  parts.push(svg("g", {}, svg("rect", { x: output.x, y: output.y, width: wide, height: tall, rx: 8, fill: variable("raised"), stroke: soft }), svg("text", { x: output.x + wide / 2, y: output.y + 27, "text-anchor": "middle", fill: ink }, "output")));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, id: "circuit-svg", role: "group", "aria-label": "Circuit: sites as nodes, measured effects as edges; the table below has the same" }, ...parts);
  document.getElementById("circuit-figure").replaceChildren(html("div", { class: "scroll" }, drawing));
  const columns = ["source", "target", ...MEASURES.map((name) => `${name} lost`)];
  const all = () => [...DATA.edges.map(([source, target, ...values]) => [DATA.sites[source].name, DATA.sites[target].name, ...values]), ...DATA.sites.map((site) => [site.name, "output, KL in nats", site.removed, ""])];
  document.getElementById("circuit-tools").replaceChildren(tools("circuit", (format) => asFile(drawing, format), columns, all), tableLater(columns, all));
}

const shownEdges = () => DATA.edges.filter((edge) => Math.abs(edge[2 + circuitState.measure]) >= circuitState.least);

function node(i, { x, y }, wide, tall) {
  const site = DATA.sites[i], chosen = circuitState.chosen === i;
  const name = site.place[1], fits = Math.floor((wide - 16) / 7);
  const choose = async () => {
    circuitState.chosen = chosen ? null : i;
    drawCircuit();
    document.querySelector(`#circuit-svg [data-site='${i}']`).focus({ preventScroll: true });
    if (!chosen) await showSite(i, { home: "circuit" });
  };
  const label = `${site.name}: ${site.parts} subcomponents active somewhere${site.removed === null ? "" : `, KL ${number(site.removed)} nats without them`}`;
  const press = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose();
  };
  return svg("g", { role: "button", tabindex: 0, "data-site": i, "aria-pressed": chosen, "aria-label": label, onclick: choose, onkeydown: press },
    svg("title", {}, label),
    svg("rect", { class: "mark", x, y, width: wide, height: tall, rx: 8, fill: variable("paper"), stroke: chosen ? variable("accent") : variable("soft"), "stroke-width": chosen ? 3 : 1 }),
    svg("text", { x: x + wide / 2, y: y + 18, "text-anchor": "middle", fill: variable("ink"), "font-weight": 600 }, name.length > fits ? `…${name.slice(1 - fits)}` : name),
    svg("text", { x: x + wide / 2, y: y + 35, "text-anchor": "middle", fill: variable("soft") }, site.parts ? `${site.parts} active` : "silent"));
}
