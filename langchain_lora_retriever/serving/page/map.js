// The pool in two dimensions, drawn as SVG. Names are text nodes, whatever they hold.

const WIDTH = 400;
const HEIGHT = 300;
const MARGIN = 24;
const MOST_NAMES = 60; // of adapters that are written beside their points all the time

const svg = document.getElementById("map");
let adapters = [];
let prompt = null;
let weights = new Map();

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function scales() {
  const places = adapters.map((adapter) => adapter.place);
  if (prompt) places.push(prompt);
  return [0, 1].map((axis) => {
    const values = places.map((place) => place[axis]);
    const low = Math.min(...values);
    const size = Math.max(...values) - low || 1;
    const room = (axis ? HEIGHT : WIDTH) - 2 * MARGIN;
    return (value) => MARGIN + ((axis ? size - (value - low) : value - low) / size) * room;
  });
}

function draw() {
  svg.replaceChildren();
  if (!adapters.length) return;
  const [x, y] = scales();
  for (const { name, place } of adapters) {
    const weight = weights.get(name);
    const used = weight === undefined ? {} : { class: "used" };
    const point = element("circle", { cx: x(place[0]), cy: y(place[1]), r: weight === undefined ? 2.5 : 3 + 4 * weight, ...used });
    point.append(element("title", {}, name));
    svg.append(point);
    if (adapters.length > MOST_NAMES && weight === undefined) continue;
    const isRight = x(place[0]) > WIDTH * 0.7;
    svg.append(
      element("text", { x: x(place[0]) + (isRight ? -5 : 5), y: y(place[1]) - 4, "text-anchor": isRight ? "end" : "start", ...used }, name),
    );
  }
  if (!prompt) return;
  const point = element("circle", { cx: x(prompt[0]), cy: y(prompt[1]), r: 5, class: "prompt" });
  point.append(element("title", {}, "the prompt"));
  svg.append(point);
}

export function showAdapters(all) {
  adapters = all.filter((adapter) => adapter.place);
  draw();
}

export function showPrompt(place, composition) {
  prompt = place;
  weights = new Map(composition.map((adapter) => [adapter.name, adapter.weight]));
  draw();
}
