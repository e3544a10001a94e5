const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot("plot-" + id, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false });
}
document.body.dataset.ready = "true";
