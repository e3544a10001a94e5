/** The figures that Plotly draws, each when it comes near the screen; colours follow the theme. */
const COLOURS = { light: ["#3366aa", "#c05a1e", "#2f8a5b", "#884499", "#bb3355", "#777733", "#1d87a8", "#555555"], dark: ["#7db4f2", "#f0a06a", "#63c98d", "#c792e0", "#f08aa4", "#cccc77", "#6fd0ec", "#b8c0cc"] };
const drawn = new Set();

function themed(figure) {
  const scale = STOPS.map(([stop, name]) => [stop, variable(name)]);
  const palette = COLOURS[theme()];
  const data = figure.data.map((trace) => {
    if (trace.type === "heatmap") return { ...trace, colorscale: scale };
    const colour = trace.meta === undefined ? null : palette[trace.meta % palette.length];
    if (colour === null) return trace;
    return { ...trace, ...(trace.line ? { line: { ...trace.line, color: colour } } : {}), marker: { ...trace.marker, color: colour } };
  });
  const axis = { gridcolor: variable("rule"), zerolinecolor: variable("rule"), linecolor: variable("rule") };
  const layout = { ...figure.layout, font: { ...figure.layout.font, color: variable("ink") }, hoverlabel: { bgcolor: variable("raised"), font: { color: variable("ink") } } };
  for (const name of Object.keys(layout)) if (/^[xy]axis\d*$/.test(name)) layout[name] = { ...layout[name], ...axis };
  return { data, layout: { xaxis: axis, yaxis: axis, ...layout } };
}

function drawPlot(name) {
  const { data, layout } = themed(FIGURES[name].figure);
  drawn.add(name);
  return Plotly.react(`plot-${name}`, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}

async function pictureOf(name, format) {
  if (!drawn.has(name)) await drawPlot(name);
  const place = document.getElementById(`plot-${name}`);
  const address = await Plotly.toImage(place, { format, width: place.clientWidth, height: place.clientHeight, scale: format === "png" ? 2 : 1 });
  return unaddressed(address);
}

/** What a data: address holds; fetch would be a request, which this page may not make. */
function unaddressed(address) {
  const [head, body] = [address.slice(0, address.indexOf(",")), address.slice(address.indexOf(",") + 1)];
  if (!head.endsWith(";base64")) return decodeURIComponent(body);
  return new Blob([Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}

function startPlots() {
  for (const [name, { columns, rows }] of Object.entries(FIGURES)) {
    const place = document.getElementById(`tools-${name}`);
    place.append(tools(name, (format) => pictureOf(name, format), columns, () => rows), tableLater(columns, () => rows));
  }
  const near = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
    near.unobserve(entry.target);
    drawPlot(entry.target.dataset.figure);
  }), { rootMargin: "400px" });
  document.querySelectorAll(".plot").forEach((place) => near.observe(place));
}
