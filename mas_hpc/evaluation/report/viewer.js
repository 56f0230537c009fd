"use strict";
// Draws the trace viewer and the charts' readouts. Data becomes text nodes only, so model text cannot become markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const outcome = (trace) => (trace.reward === null ? "ungraded" : trace.reward > 0 ? "right" : "wrong");
const marks = { right: "\u2713", wrong: "\u2717", ungraded: "\u00b7" };
const signed = (value) => (value === null ? "-" : (value > 0 ? "+" : "") + Number(value.toFixed(3)));

function el(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children.filter((child) => child !== null));
  return node;
}

function chip(text, kind) {
  const node = el("span", "chip " + kind, text);
  node.title = text;
  return node;
}

function button(className, label, onClick) {
  const node = el("button", className, label);
  node.type = "button";
  node.addEventListener("click", onClick);
  return node;
}

// One try: a card that unfolds into its text, its numbers and, below, what grew from it.
function card(turn, view) {
  const agent = el("span", "agent", el("i", "c" + (view.agents.indexOf(turn.agent) % 6)), turn.agent);
  const tone = turn.reward === null ? "" : turn.reward > 0 ? "good" : "bad";
  const summary = el("summary", "", agent,
    turn.committed ? chip("committed", "accent") : null,
    turn.answer === null ? null : chip("answer " + turn.answer, ""),
    turn.verdict === null ? null : chip(turn.verdict ? "approves" : "rejects", ""),
    turn.reward === null ? null : chip("reward " + signed(turn.reward), tone),
    turn.credit === null ? null : chip("credit " + signed(turn.credit), ""),
    turn.finish === "stop" ? null : chip(turn.finish === "length" ? "cut at the limit" : "error", "bad"),
    el("span", "preview", turn.text.trim().slice(0, 120)));
  const perToken = turn.tokens && turn.logprob !== null ? turn.logprob / turn.tokens : null;
  const facts = [["local reward", signed(turn.local)], ["team reward", signed(turn.team)], ["log-prob", signed(turn.logprob)],
    ["per token", signed(perToken)], ["tokens", turn.tokens], ["prompt tokens", turn.promptTokens], ["finish", turn.finish],
    ["sibling", turn.sibling], ["seed", turn.seed], ["policy", turn.policy + " v" + turn.version]];
  const node = el("details", "turn" + (turn.committed ? " committed" : ""), summary,
    el("p", "text", turn.text || "(empty)"),
    turn.error ? el("p", "warning", turn.error) : null,
    el("p", "facts", ...facts.filter(([, value]) => value !== "-").map(([name, value]) => el("span", "", name + " ", el("b", "", String(value))))));
  node.open = turn.committed;
  view.cards.set(turn, node);
  return node;
}

// The tries of one agent from one state: a strip of all, the committed one in full, the others folded.
function state(tries, view) {
  const group = el("div", "state");
  const rest = tries.filter((turn) => !turn.committed);
  const best = Math.max(...tries.map((turn) => turn.reward ?? -Infinity));
  const worst = Math.min(...tries.map((turn) => turn.reward ?? Infinity));
  if (tries.length > 1) {
    const strip = el("div", "tries", tries[0].agent + ", reward of each try:");
    for (const turn of tries) {
      const rank = best === worst ? "" : turn.reward === best ? " high" : turn.reward === worst ? " low" : "";
      strip.append(button((turn.committed ? "committed" : "") + rank, signed(turn.reward), () => reveal(view.cards.get(turn))));
    }
    group.append(strip);
  }
  for (const turn of tries.filter((turn) => turn.committed)) group.append(card(turn, view), grown(turn.id, view));
  if (rest.length > 0) {
    const label = rest.length + (rest.length === tries.length ? "" : " other") + (rest.length === 1 ? " try" : " tries");
    const folded = el("details", "folded", el("summary", "", label + ", not committed"));
    for (const turn of rest) folded.append(card(turn, view), grown(turn.id, view));
    group.insertBefore(folded, group.querySelector(":scope > .children"));
  }
  return group;
}

function reveal(node) {
  for (let outer = node; outer; outer = outer.parentElement.closest("details")) outer.open = true;
  node.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

// Everything whose parent is `id`: states that continue the episode, then folded continuations that only value a try.
function grown(id, view) {
  const children = view.children.get(id) ?? [];
  if (children.length === 0) return nothing();
  const box = el("div", id === null ? "" : "children");
  for (const tries of states(children.filter((turn) => !turn.counterfactual))) box.append(state(tries, view));
  const only = children.filter((turn) => turn.counterfactual);
  if (only.length > 0) {
    const text = only.length + " counterfactual continuation" + (only.length > 1 ? "s" : "") + ", sampled only to value this turn";
    const folded = el("details", "folded", el("summary", "", text));
    for (const turn of only) folded.append(card(turn, view), grown(turn.id, view));
    box.append(folded);
  }
  return box;
}

const nothing = () => document.createDocumentFragment();

function states(turns) {
  const groups = new Map();
  for (const turn of turns) {
    const key = JSON.stringify([turn.index, turn.agent]);
    groups.set(key, [...(groups.get(key) ?? []), turn]);
  }
  return groups.values();
}

function draw(trace) {
  const ids = new Set(trace.turns.map((turn) => turn.id));
  const view = { agents: [...new Set(trace.turns.map((turn) => turn.agent))], children: new Map(), cards: new Map() };
  for (const turn of trace.turns) {
    const parent = ids.has(turn.parent) ? turn.parent : null;
    view.children.set(parent, [...(view.children.get(parent) ?? []), turn]);
  }
  const kind = outcome(trace);
  const others = data.traces.filter((other) => other.task === trace.task && other !== trace);
  byId("trace").replaceChildren(
    el("div", "asked", el("p", "question text", trace.question),
      trace.compact ? el("p", "text", trace.compact) : null,
      el("p", kind, marks[kind] + " answered " + (trace.answer ?? "nothing") + ", expected " + trace.expected),
      el("p", "muted", trace.task + " \u00b7 " + trace.set + " \u00b7 step " + trace.step + " \u00b7 " + trace.turns.length + " turns"),
      others.length === 0 ? null : el("p", "muted", "Same question in: ", ...others.map((other) =>
        button("", marks[outcome(other)] + " " + other.set + (other.step ? ", step " + other.step : ""), () => select(other))))),
    grown(null, view));
}

function select(trace) {
  draw(trace);
  for (const node of byId("list").querySelectorAll("button"))
    node.toggleAttribute("aria-current", data.traces[Number(node.dataset.trace)] === trace);
}

function refresh() {
  const [set, wanted, text] = [byId("set").value, byId("outcome").value, byId("find").value.toLowerCase()];
  const holds = (trace) => (trace.question + trace.turns.map((turn) => turn.text).join("\n")).toLowerCase().includes(text);
  const found = data.traces.filter((trace) =>
    (set === "" || trace.set === set) && (wanted === "" || outcome(trace) === wanted) && (text === "" || holds(trace)));
  byId("matches").textContent = found.length + " of " + data.traces.length;
  byId("list").replaceChildren(...found.map((trace) => {
    const kind = outcome(trace);
    const row = button("", el("span", kind, marks[kind]), () => select(trace));
    row.append(el("span", "question", trace.question),
      el("small", "", trace.set + (trace.step ? ", step " + trace.step : "") + " \u00b7 " + (trace.answer ?? "no answer")));
    row.dataset.trace = data.traces.indexOf(trace);
    return el("li", "", row);
  }));
  if (found.length > 0) select(found[0]);
  else byId("trace").replaceChildren(el("p", "muted", "No trace matches."));
}

function startViewer() {
  for (const set of new Set(data.traces.map((trace) => trace.set))) {
    const option = el("option", "", set);
    option.value = set;
    byId("set").append(option);
  }
  for (const id of ["set", "outcome", "find"]) byId(id).addEventListener("input", refresh);
  byId("viewer").hidden = false;
  refresh();
}

// A dashed line under the pointer, and the values at the nearest step in the legend.
function startReadout(figure) {
  const svg = figure.querySelector("svg"), output = figure.querySelector("output"), resting = output.textContent;
  const series = data.charts[Number(figure.dataset.chart)];
  const values = figure.querySelectorAll(".legend b");
  const steps = [...new Set(series.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const [left, width, bottom] = [46, 360 - 46 - 8, 190 - 22]; // LEFT, WIDTH, HEIGHT, ... of plots.py
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) * 360 / box.width - left) / width;
    const first = steps[0], last = steps[steps.length - 1], aim = first + share * (last - first);
    const step = steps.reduce((near, other) => (Math.abs(other - aim) < Math.abs(near - aim) ? other : near));
    const x = left + (last > first ? (step - first) / (last - first) : 0.5) * width;
    cursor.setAttribute("d", "M" + x + " 8V" + bottom);
    output.textContent = "step " + step;
    values.forEach((value, index) => {
      const point = series[index].points.find((candidate) => candidate[0] === step);
      value.textContent = !point ? "" : point[1] === null ? "not finite" : Number(point[1].toPrecision(3));
    });
  });
  svg.addEventListener("pointerleave", () => {
    cursor.removeAttribute("d");
    output.textContent = resting;
    for (const value of values) value.textContent = "";
  });
}

for (const figure of document.querySelectorAll("figure[data-chart]")) startReadout(figure);
if (data.traces.length > 0) startViewer();
