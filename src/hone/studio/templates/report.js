const report = JSON.parse(document.getElementById("report-data").textContent);
// A centred mean over a small part of the run: what the eye would draw through the points.
function smooth(values) {
  const reach = Math.floor(values.length / 50);
  if (values.length < 60) return null;
  return values.map((_, at) => {
    const near = values.slice(Math.max(0, at - reach), at + reach + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

function xOf(series, byTime) {
  const known = series.steps.every((step) => step !== null);
  return byTime || !known ? series.minutes : series.steps;
}

function curve(line, index, byTime) {
  const series = report.series[line.metric];
  const x = xOf(series, byTime);
  const smoothed = line.raw ? null : smooth(series.values);
  const drawn = { x, type: "scatter", name: line.label, line: { color: colour(index), width: 2 }, legendgroup: line.label };
  const few = x.length < 40 ? "lines+markers" : "lines";
  if (!smoothed) return [{ ...drawn, y: series.values, mode: few, marker: { color: colour(index), size: 5 } }];
  return [
    { ...drawn, y: series.values, mode: "lines", opacity: 0.3, line: { color: colour(index), width: 1 }, showlegend: false, hoverinfo: "skip" },
    { ...drawn, y: smoothed, mode: "lines" },
  ];
}

function drawChart(element, chart, byTime) {
  const stepless = chart.lines.some((line) => report.series[line.metric].steps.some((step) => step === null));
  const traces = chart.lines.flatMap((line, index) => curve(line, index, byTime));
  const yaxis = { title: { text: chart.unit, font: { size: 11 } }, type: chart.log ? "log" : "linear", exponentformat: "power", minexponent: 5, nticks: 6 };
  if (chart.from_zero) yaxis.rangemode = "tozero";
  const title = byTime || stepless ? "minutes since the start" : "step";
  Plotly.react(element, traces, layout({ xaxis: { title: { text: title, font: { size: 11 } } }, yaxis, showlegend: chart.lines.length > 1 }), options);
}

function drawTimeline(element, timeline) {
  const traces = timeline.map((name, index) => ({
    type: "bar", orientation: "h", name: name.name, y: name.rows, base: name.starts, x: name.seconds, text: name.texts,
    opacity: 0.8, marker: { color: colour(index), line: { width: 0 } }, textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  }));
  Plotly.react(element, traces, layout({
    barmode: "overlay", showlegend: false, hovermode: "closest", bargap: 0.25, yaxis: { automargin: true, autorange: "reversed" },
    xaxis: { title: { text: "seconds within the window", font: { size: 11 } } },
  }), options);
}

function draw() {
  const chosen = document.querySelector("input[name=axis]:checked");
  const byTime = chosen !== null && chosen.value === "time";
  report.charts.forEach((chart) => drawChart(document.getElementById(chart.id), chart, byTime));
  if (report.timeline.length) drawTimeline(document.getElementById("timeline-plot"), report.timeline);
  const select = document.getElementById("any-metric");
  if (select) drawChart(document.getElementById("any-plot"), { lines: [{ metric: select.value, label: select.value }], unit: "" }, byTime);
}

document.querySelectorAll("input[name=axis], #any-metric").forEach((input) => input.addEventListener("change", draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
