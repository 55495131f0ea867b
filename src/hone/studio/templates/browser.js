// The list of traces: a light index in memory, the messages in compressed chunks that are unpacked when they are read.
const PAGE = 25;
const index = report.traces.columns;
const unpacked = new Map();
let found = [];
let page = 0;
let asked = 0;

function chunk(number) {
  if (!unpacked.has(number)) unpacked.set(number, unpack(report.traces.chunks[number]));
  return unpacked.get(number);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function traceAt(row) {
  const size = report.traces.chunk_size;
  return (await chunk(Math.floor(row / size)))[row % size];
}

function passes(row) {
  const cell = report.cells[index.cell[row]];
  const outcome = value("by-outcome");
  return (!value("by-environment") || cell.environment === value("by-environment"))
    && (!value("by-model") || cell.model === value("by-model"))
    && (!outcome || (outcome === "truncated" ? index.is_truncated[row] : index.outcome[row] === outcome));
}

const value = (id) => document.getElementById(id).value;

async function says(row, words) {
  if (index.task[row] === words[0]) return true;
  const trace = await traceAt(row);
  const text = [trace.failure, ...trace.messages.flatMap((message) => [message.reasoning, message.content])].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

async function filter() {
  const own = ++asked;
  const words = value("by-text").toLowerCase().split(/\s+/).filter(Boolean);
  const rows = index.task.map((_, row) => row).filter(passes);
  const kept = [];
  for (const row of rows) {
    if (!words.length || await says(row, words)) kept.push(row);
    if (own !== asked) return; // something else has been asked meanwhile
  }
  found = kept;
  page = 0;
  list();
}

function list() {
  const most = Math.max(1, Math.ceil(found.length / PAGE));
  document.getElementById("found").textContent = `${found.length.toLocaleString("en")} of ${index.task.length.toLocaleString("en")} traces`;
  document.getElementById("page").textContent = `page ${page + 1} of ${most}`;
  document.getElementById("before").disabled = page === 0;
  document.getElementById("after").disabled = page + 1 >= most;
  const rows = found.slice(page * PAGE, (page + 1) * PAGE).map(entry);
  document.getElementById("list").replaceChildren(...(rows.length ? rows : [made("p", { className: "empty" }, "No trace is like that.")]));
}

function entry(row) {
  const cell = report.cells[index.cell[row]];
  const outcome = index.outcome[row];
  const mark = { solved: "tag good", unsolved: "tag", failed: "tag bad" }[outcome];
  const inside = made("div", { className: "inside" });
  const details = made("details", { className: "trace" },
    made("summary", {},
      made("span", { className: mark }, outcome),
      outcome === "failed" ? "" : made("span", { className: "tag" }, `reward ${index.reward[row]}`),
      index.is_truncated[row] ? made("span", { className: "tag" }, "truncated") : "",
      made("span", { className: "soft" }, `${cell.model} · ${cell.environment} · attempt ${index.attempt[row]}`),
      made("span", { className: "text" }, index.title[row])),
    inside);
  details.addEventListener("toggle", async () => {
    if (details.open && !inside.childElementCount) inside.replaceChildren(...shown(await traceAt(row), row));
  });
  return details;
}

function shown(trace, row) {
  const messages = trace.messages.map((message) => made("div", { className: `message ${message.role}` },
    made("div", { className: "role" }, message.detail ? `${message.role} · ${message.detail}` : message.role),
    message.reasoning ? made("pre", { className: "soft" }, message.reasoning) : "",
    made("pre", {}, message.content)));
  const failure = trace.failure ? [made("p", { className: "bad" }, `Failed: ${trace.failure}`)] : [];
  const others = made("button", { type: "button", onclick: () => showTask(index.task[row]) }, "all attempts at this task");
  return [...messages, ...failure, made("p", { className: "soft" }, trace.facts), others];
}

function showTask(task) {
  for (const id of ["by-environment", "by-model", "by-outcome"]) document.getElementById(id).value = "";
  document.getElementById("by-text").value = task;
  document.getElementById("traces").scrollIntoView();
  filter();
}

function turn(by) {
  page += by;
  list();
  document.getElementById("found").scrollIntoView();
}

for (const id of ["by-environment", "by-model", "by-outcome"]) document.getElementById(id).addEventListener("change", filter);
let typing;
document.getElementById("by-text").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(filter, 250); });
document.getElementById("before").addEventListener("click", () => turn(-1));
document.getElementById("after").addEventListener("click", () => turn(1));
draw();
filter();
