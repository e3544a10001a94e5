/** The importance map: sites down, roles, tokens or positions across. Every cell is a button; arrow keys move between them. */
const mapState = { view: 0, row: null, column: null };

function drawMap() {
  const view = DATA.views[mapState.view];
  const place = document.getElementById("map-figure");
  const wide = Math.max(320, place.clientWidth || 900);
  const label = Math.min(wide < 600 ? 120 : 210, 14 + 7 * Math.max(...DATA.sites.map((site) => shortName(site.name).length)));
  const cell = Math.max(view.columns.length > 20 ? 17 : 34, Math.min(90, Math.floor((wide - label - 4) / view.columns.length)));
  const tall = 24, top = view.kind === "sequence" && DATA.tokenRoles ? 38 : 24;
  const [width, height] = [label + cell * view.columns.length + 2, top + tall * DATA.sites.length + 2];
  const highest = Math.max(1e-9, ...view.values.flat());
  const ink = variable("ink"), soft = variable("soft");
  const parts = [];
  view.columns.forEach((column, j) => {
    const x = label + cell * (j + 0.5);
    const fits = Math.max(1, Math.floor(cell / 7.2));
    const text = column.trim() || "␣";
    parts.push(svg("text", { x, y: top - 8, "text-anchor": "middle", fill: soft }, svg("title", {}, column), [...text].slice(0, fits).join("")));
    const role = top > 24 ? DATA.tokenRoles[view.sequence][j] : null;
    if (role && view.columns.length > 1 && DATA.tokenRoles[view.sequence].filter((each) => each === role).length < 3) parts.push(svg("text", { x, y: 12, "text-anchor": "middle", fill: ink, "font-weight": 600 }, role));
  });
  DATA.sites.forEach((site, i) => {
    const fits = Math.floor((label - 10) / 6.6), name = shortName(site.name);
    const y = top + tall * i;
    parts.push(svg("text", { x: label - 6, y: y + 16, "text-anchor": "end", fill: ink }, svg("title", {}, site.name), name.length > fits ? `…${name.slice(1 - fits)}` : name));
    view.columns.forEach((column, j) => parts.push(mapCell(view, i, j, { x: label + cell * j, y, cell, tall, highest })));
  });
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `Importance ${view.label}: sites down, ${view.columns.length} columns across`, id: "map-svg" }, ...parts);
  place.replaceChildren(html("div", { class: "scroll" }, drawing));
  const rows = () => DATA.sites.map((site, i) => [site.name, ...view.values[i]]);
  const columns = ["site", ...view.columns];
  document.getElementById("map-tools").replaceChildren(tools("importance", (format) => asFile(drawing, format), columns, rows), tableLater(columns, rows));
}

function mapCell(view, i, j, { x, y, cell, tall, highest }) {
  const value = view.values[i][j];
  const { fill, text } = shade(value / highest);
  const first = i === (mapState.row ?? 0) && j === (mapState.column ?? 0);
  const chosen = i === mapState.row && j === mapState.column;
  const attributes = {
    role: "button", tabindex: first ? 0 : -1, "data-row": i, "data-column": j, "aria-pressed": chosen,
    "aria-label": `${DATA.sites[i].name}, ${view.columns[j].trim() || "space"}${view.kind === "sequence" ? `, position ${j}` : ""}: ${number(value)}`,
    onclick: () => chooseCell(i, j), onkeydown: (event) => moveInMap(event, i, j),
  };
  const mark = svg("rect", { class: "mark", x: x + 1, y: y + 1, width: cell - 2, height: tall - 2, rx: 2, fill, stroke: chosen ? variable("accent") : "none", "stroke-width": 3 });
  const shown = cell >= 34 ? [svg("text", { x: x + cell / 2, y: y + 16, "text-anchor": "middle", fill: text }, value < 0.005 ? "0" : value.toFixed(2))] : [];
  return svg("g", attributes, svg("title", {}, attributes["aria-label"]), mark, ...shown);
}

function moveInMap(event, i, j) {
  const view = DATA.views[mapState.view];
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    chooseCell(i, j);
  } else if (step) {
    event.preventDefault();
    const [row, column] = [Math.min(DATA.sites.length - 1, Math.max(0, i + step[0])), Math.min(view.columns.length - 1, Math.max(0, j + step[1]))];
    document.querySelectorAll("#map-svg [tabindex='0']").forEach((each) => each.setAttribute("tabindex", -1));
    const cell = document.querySelector(`#map-svg [data-row='${row}'][data-column='${column}']`);
    cell.setAttribute("tabindex", 0);
    cell.focus();
  }
}

async function chooseCell(i, j) {
  const focused = document.activeElement?.closest?.("#map-svg");
  mapState.row = i;
  mapState.column = j;
  document.querySelectorAll("#map-svg [role=button]").forEach((cell) => {
    const chosen = Number(cell.dataset.row) === i && Number(cell.dataset.column) === j;
    cell.setAttribute("aria-pressed", chosen);
    cell.querySelector(".mark").setAttribute("stroke", chosen ? variable("accent") : "none");
  });
  await showSite(i, { view: DATA.views[mapState.view], column: j });
  if (focused) document.querySelector("#panel .parts button")?.focus({ preventScroll: true });
}

/** How important a part is in a column of a view; none where only shown sequences could tell and its strips are left out. */
function importanceIn(part, view, column) {
  if (!view) return part.mean;
  if (view.kind === "role") return part.roles[column];
  if (!part.importance) return null;
  if (view.kind === "sequence") return part.importance[view.sequence][column];
  const places = DATA.tokenRoles.flatMap((roles, row) => {
    const at = roles.indexOf(view.role) + view.offsets[column];
    return at >= 0 && at < roles.length ? [part.importance[row][at]] : [];
  });
  return places.length ? places.reduce((sum, value) => sum + value, 0) / places.length : null;
}
