const theme = () => document.documentElement.dataset.theme;

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "light" : "dark";
  drawMap();
  drawCircuit();
  drawn.forEach((figure) => drawPlot(figure));
  document.querySelector("#panel .parts button[aria-pressed='true']")?.click();
}

function startMap() {
  const choice = document.getElementById("view");
  DATA.views.forEach((view, i) => choice.append(html("option", { value: i }, view.label)));
  choice.addEventListener("change", () => {
    Object.assign(mapState, { view: Number(choice.value), row: null, column: null });
    drawMap();
  });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (width === window.innerWidth) return;
    width = window.innerWidth;
    drawMap();
  });
}

function startCircuit() {
  const [measure, least, shown] = ["measure", "least", "least-shown"].map((id) => document.getElementById(id));
  MEASURES.forEach((name, i) => measure.append(html("option", { value: i }, name)));
  measure.addEventListener("change", () => { circuitState.measure = Number(measure.value); drawCircuit(); });
  least.addEventListener("input", () => { circuitState.least = Number(least.value); shown.textContent = least.value; drawCircuit(); });
}

/** An address ending in #part=site,number opens there. */
async function openAddressed() {
  const found = /^#part=(.+),(\d+)$/.exec(location.hash);
  const site = found ? DATA.sites.findIndex((each) => each.name === decodeURIComponent(found[1])) : -1;
  if (site >= 0) await showSite(site, { chosen: Number(found[2]) });
}

startMap();
startCircuit();
setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.getElementById("theme").addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
startPlots();
openAddressed().then(() => { document.body.dataset.ready = "true"; });
