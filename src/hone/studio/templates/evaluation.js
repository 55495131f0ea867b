const report = JSON.parse(document.getElementById("report-data").textContent);
const models = [...new Set(report.cells.map((cell) => cell.model))];
const environments = [...new Set(report.cells.map((cell) => cell.environment))];
const cellOf = (model, environment) => report.cells.find((cell) => cell.model === model && cell.environment === environment);
const colourOf = (model) => colour(models.indexOf(model));
const small = (text) => ({ text, font: { size: 11 } });
const labelOf = (model) => escaped(model);

// An element with properties and children; texts stay texts.
function made(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function reach(points) {
  const array = points.map((point) => (point.high === null ? 0 : point.high - point.mean));
  const arrayminus = points.map((point) => (point.low === null ? 0 : point.mean - point.low));
  return { type: "data", symmetric: false, array, arrayminus, thickness: 1.5, width: 4 };
}

// Enough height for every row of a horizontal chart, and room for the axis.
function drawRows(id, numRows, traces, extra) {
  const element = document.getElementById(id);
  element.style.height = `${Math.max(200, 90 + 26 * numRows)}px`;
  const yaxis = { automargin: true, autorange: "reversed", type: "category", ...extra.yaxis };
  Plotly.react(element, traces, layout({ hovermode: "closest", ...extra, yaxis }), options);
}

function drawRewards() {
  const traces = models.map((model) => {
    const cells = environments.map((name) => cellOf(model, name)).filter((cell) => cell && cell.reward);
    const points = cells.map((cell) => cell.reward);
    return {
      type: "bar", orientation: "h", name: labelOf(model), y: cells.map((cell) => escaped(cell.environment)), x: points.map((point) => point.mean),
      error_x: { ...reach(points), color: style("--ink") }, opacity: 0.85,
      marker: { color: colourOf(model), pattern: { shape: cells.map((cell) => (cell.is_finished ? "" : "/")) } },
      hovertemplate: `${escaped(model)}: %{x:.3f}<extra></extra>`,
    };
  });
  drawRows("reward-plot", environments.length * models.length, traces, { barmode: "group", bargap: 0.3, xaxis: { title: small("mean reward") } });
}

function drawCurves(element) {
  const traces = report.cells.filter((cell) => cell.environment === element.dataset.environment).flatMap((cell) =>
    [["pass@k", "solid"], ["pass^k", "dash"]].map(([name, dash]) => {
      const points = cell.curves[name];
      return {
        type: "scatter", mode: "lines+markers", name: labelOf(cell.model), legendgroup: cell.model, showlegend: name === "pass@k",
        x: points.map((point) => point.k), y: points.map((point) => point.mean),
        error_y: { ...reach(points), color: colourOf(cell.model), thickness: 1 },
        line: { color: colourOf(cell.model), dash, width: 2 }, marker: { size: 5 },
        hovertemplate: `${escaped(cell.model)}, ${name}, k = %{x}: %{y:.3f}<extra></extra>`,
      };
    }));
  const most = Math.max(...traces.flatMap((trace) => trace.x));
  const ticks = Array.from({ length: most }, (_, index) => index + 1).filter((k) => most <= 8 || (k & (k - 1)) === 0 || k === most);
  Plotly.react(element, traces, layout({
    hovermode: "closest", xaxis: { title: small("attempts k"), type: "log", tickvals: ticks, ticktext: ticks.map(String) }, yaxis: { range: [-0.03, 1.03] },
  }), options);
}

function chosenPairs() {
  const first = document.getElementById("first-model").value;
  return report.pairs.filter((pair) => pair.first === first);
}

function drawPairs() {
  const pairs = chosenPairs();
  const rows = pairs.map((pair) => escaped(`${pair.second} · ${pair.environment}`));
  const differ = pairs.some((pair) => pair.reward && Math.abs(pair.reward.mean - pair.solved.mean) > 1e-9);
  const traces = (differ ? ["reward", "solved"] : ["reward"]).map((score, index) => {
    const known = pairs.map((pair, at) => [pair[score], rows[at]]).filter(([found]) => found);
    const points = known.map(([found]) => found);
    return {
      type: "scatter", mode: "markers", name: score, y: known.map(([, row]) => row), x: points.map((point) => point.mean),
      error_x: { ...reach(points), color: colour(index) }, marker: { color: colour(index), size: 9, symbol: index ? "diamond" : "circle" },
      hovertemplate: `${score}: %{x:+.3f}<extra></extra>`,
    };
  });
  drawRows("pairs-plot", rows.length * 1.6, traces, {
    scattermode: "group", xaxis: { rangemode: "tozero", title: small(escaped(`minus ${document.getElementById("first-model").value}`)), zeroline: true, zerolinewidth: 2, zerolinecolor: style("--soft") },
  });
  listPairs(pairs);
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const interval = (found) => (found.low === null ? "unknown" : `${signed(found.low)} … ${signed(found.high)}`);

function cellsOf(found) {
  return found ? [signed(found.mean), interval(found), found.p] : ["", "no task in common", ""];
}

function listPairs(pairs) {
  document.getElementById("pairs").replaceChildren(...pairs.map((pair) => {
    const numbers = [...cellsOf(pair.reward), ...cellsOf(pair.solved), pair.solved ? pair.solved.num_tasks : 0, pair.num_lost, pair.num_gained];
    return made("tr", {}, made("td", {}, pair.environment), made("td", {}, pair.second), ...numbers.map((text) => made("td", { className: "number" }, String(text))));
  }));
  document.getElementById("flips").replaceChildren(...pairs.filter((pair) => pair.flips.length).map((pair) => {
    const most = pair.num_lost + pair.num_gained > pair.flips.length ? `, the first ${pair.flips.length}` : "";
    const share = (value) => `${Math.round(100 * value)} %`;
    const rows = pair.flips.map((flip) => made("tr", {},
      made("td", { className: flip.second > flip.first ? "" : "bad" }, flip.second > flip.first ? "gained" : "lost"),
      made("td", {}, made("button", { type: "button", title: "show its traces", onclick: () => showTask(flip.task) }, flip.task)),
      made("td", { className: "number" }, share(flip.first)), made("td", { className: "number" }, share(flip.second)), made("td", {}, flip.prompt)));
    const head = made("tr", {}, ...["", "task", pair.first, pair.second, "prompt"].map((text, at) => made("th", { scope: "col", className: at === 2 || at === 3 ? "number" : "" }, text)));
    return made("details", {},
      made("summary", {}, `Tasks that flipped: ${pair.second} on ${pair.environment} (${pair.num_lost} lost, ${pair.num_gained} gained${most})`),
      made("div", { className: "inside scroll" }, made("table", {}, made("thead", {}, head), made("tbody", {}, ...rows))));
  }));
}

function drawLengths() {
  const cells = report.cells.filter((cell) => cell.lengths);
  const traces = models.map((model) => {
    const own = cells.filter((cell) => cell.model === model);
    const at = (place) => own.map((cell) => cell.lengths[place]);
    return {
      type: "box", orientation: "h", name: labelOf(model), y: own.map((cell) => escaped(cell.environment)), lowerfence: at(0), q1: at(1), median: at(2), q3: at(3), upperfence: at(4),
      marker: { color: colourOf(model) }, line: { width: 1.5 },
    };
  });
  drawRows("lengths-plot", cells.length, traces, { boxmode: "group", xaxis: { title: small("tokens"), rangemode: "tozero" } });
}

function drawEndings() {
  const endings = [...new Set(report.cells.flatMap((cell) => Object.keys(cell.endings)))];
  const shades = { completed: "--c2", max_tokens: "--c1", max_turns: "--c6", max_tool_calls: "--c5", timeout: "--c7" };
  const failures = ["--bad", "--c3", "--c0", "--soft"];
  const traces = endings.map((ending) => ({
    type: "bar", orientation: "h", name: escaped(ending), y: report.cells.map((cell) => escaped(`${cell.model} · ${cell.environment}`)),
    x: report.cells.map((cell) => cell.endings[ending] || 0),
    marker: { color: style(shades[ending] || failures[endings.filter((other) => !shades[other]).indexOf(ending) % failures.length]) },
    hovertemplate: `${escaped(ending)}: %{x:,}<extra></extra>`,
  }));
  drawRows("endings-plot", report.cells.length, traces, { barmode: "stack", legend: { ...layout({}).legend, traceorder: "normal" }, xaxis: { title: small("rollouts") }, showlegend: true });
}

function draw() {
  drawRewards();
  document.querySelectorAll(".curves").forEach(drawCurves);
  if (document.getElementById("pairs-plot")) drawPairs();
  drawLengths();
  drawEndings();
}

const first = document.getElementById("first-model");
if (first) first.addEventListener("change", drawPairs);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
