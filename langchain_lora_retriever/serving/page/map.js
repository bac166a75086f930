// The pool in two dimensions, drawn as SVG. Names are text nodes, whatever they hold.

const WIDTH = 400;
const HEIGHT = 300;
const MARGIN = 24;
const LETTER = 4.6; // a name's width by its letters, and its height
const LINE = 9;
const CORNERS = [[5, -4], [-5, -4], [5, 10], [-5, 10], [5, -13], [-5, -13], [5, 19], [-5, 19]]; // where a name may stand

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

// Where a name is written beside its point without covering another; null if there is no room: its point has it too.
function roomFor(name, x, y, taken) {
  const width = name.length * LETTER;
  for (const [dx, dy] of CORNERS) {
    const left = dx > 0 ? x + dx : x + dx - width;
    const box = { left, right: left + width, top: y + dy - LINE, bottom: y + dy };
    const isInside = left >= 0 && box.right <= WIDTH && box.top >= 0 && box.bottom <= HEIGHT;
    const isFree = taken.every((other) => box.left >= other.right || box.right <= other.left || box.top >= other.bottom || box.bottom <= other.top);
    if (!isInside || !isFree) continue;
    taken.push(box);
    return { x: x + dx, y: y + dy, "text-anchor": dx > 0 ? "start" : "end" };
  }
  return null;
}

function draw() {
  svg.replaceChildren();
  if (!adapters.length) return;
  const [x, y] = scales();
  const taken = [];
  const isUsed = ({ name }) => weights.has(name);
  for (const { name, place } of [...adapters.filter(isUsed), ...adapters.filter((adapter) => !isUsed(adapter))]) {
    const weight = weights.get(name);
    const used = weight === undefined ? {} : { class: "used" };
    const point = element("circle", { cx: x(place[0]), cy: y(place[1]), r: weight === undefined ? 2.5 : 3 + 4 * weight, ...used });
    point.append(element("title", {}, name));
    svg.append(point);
    const room = roomFor(name, x(place[0]), y(place[1]), taken);
    if (room) svg.append(element("text", { ...room, ...used }, name));
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
