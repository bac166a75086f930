// The playground and explorer of a server. Whatever a pool or a model says becomes a text node, never markup.

import { events, json, onKeyWanted, ServerError } from "./api.js";
import { showAdapters, showPrompt } from "./map.js";

const MOST_RUNS = 10;
const MOST_SHOWN = 200; // adapters in a list at once; the filter finds the others
const LOOK_AFTER_MS = 300; // without a key pressed
const POLL_MS = 2000;

const at = (id) => document.getElementById(id);
const pinned = new Set();
const excluded = new Set();
let pool = null;
let running = null; // what stops the answers that are coming
let looking = null; // what stops the look for a prompt's adapters
let lookLater = 0;

function made(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function row(...cells) {
  const line = made("tr");
  for (const cell of cells) {
    const box = made("td");
    box.append(cell instanceof Node ? cell : String(cell));
    if (/^[\d.]+$/.test(box.textContent)) box.className = "number";
    line.append(box);
  }
  return line;
}

// Says what went wrong; what the user has stopped is none.
function tell(place, error) {
  if (error.name === "AbortError") return;
  place.textContent = error instanceof ServerError ? error.message : `The server cannot be reached: ${error.message}`;
}

// Settings

function settings() {
  const own = { composition: at("composition").value, top_k: Number(at("top_k").value) };
  if (pinned.size) own.adapters = [...pinned];
  else if (excluded.size) own.exclude_adapters = [...excluded];
  return own;
}

function toggle(chosen, other, name) {
  if (!chosen.delete(name)) chosen.add(name);
  other.delete(name);
  showChoices();
  look();
}

function choice(chosen, other, name, verb) {
  const button = made("button", verb, { type: "button", "aria-pressed": chosen.has(name), "aria-label": `${verb} ${name}` });
  button.addEventListener("click", () => toggle(chosen, other, name));
  return button;
}

function showChoices() {
  const wanted = at("filter").value.toLowerCase();
  const focused = document.activeElement?.getAttribute("aria-label");
  const shown = pool.adapters.filter((adapter) => adapter.name.toLowerCase().includes(wanted)).slice(0, MOST_SHOWN);
  at("adapters").tBodies[0].replaceChildren(
    ...shown.map(({ name, rank, num_samples }) =>
      row(name, rank, num_samples, choice(pinned, excluded, name, "pin"), choice(excluded, pinned, name, "exclude")),
    ),
  );
  if (focused) [...at("adapters").querySelectorAll("button")].find((b) => b.getAttribute("aria-label") === focused)?.focus();
}

// The pool

async function readPool() {
  pool = await json("v1/pool");
  at("model").textContent = `${pool.model} with ${pool.adapters.length} adapters`;
  at("pool-state").textContent = `${pool.adapters.length} adapters${pool.encoder ? `, found by ${pool.encoder}` : ""}.`;
  for (const name of ["composition", "top_k", "max_tokens", "temperature"]) at(name).value = pool.settings[name];
  at("map-caption").textContent =
    `Adapters whose samples are alike lie together: two dimensions of the embeddings, with ${Math.round(100 * pool.explained)} % of what tells them apart.`;
  showAdapters(pool.adapters);
  showChoices();
  for (const adapter of pool.adapters.filter((each) => each.samples.length).slice(0, MOST_SHOWN)) {
    const group = made("optgroup", undefined, { label: adapter.name });
    for (const sample of adapter.samples) {
      const short = sample.length > 80 ? `${sample.slice(0, 80)}...` : sample;
      group.append(made("option", short, { value: sample }));
    }
    at("sample").append(group);
  }
  const rejected = Object.entries(pool.rejected);
  at("rejected-box").querySelector("summary").textContent = `Rejected (${rejected.length})`;
  at("rejected").replaceChildren(
    ...(rejected.length ? rejected.flatMap(([name, why]) => [made("dt", name), made("dd", why)]) : [made("dt", "None.")]),
  );
}

async function readTwins() {
  if (!at("twins-box").open || at("twins").childElementCount) return;
  at("twins-state").textContent = "Comparing every pair of adapters by their samples.";
  try {
    const { twins } = await json("v1/pool/twins");
    at("twins-state").textContent = twins.length
      ? "The encoder tells the samples of these apart no better than a coin:"
      : "None: the encoder tells the samples of every two adapters apart.";
    at("twins").replaceChildren(...twins.map((pair) => made("li", `${pair.first} and ${pair.second} (${pair.similarity.toFixed(2)})`)));
  } catch (error) {
    tell(at("twins-state"), error);
  }
}

// Routing

function look() {
  clearTimeout(lookLater);
  lookLater = setTimeout(lookNow, LOOK_AFTER_MS);
}

async function lookNow() {
  looking?.abort();
  const text = at("prompt").value.trim();
  if (!text) return;
  looking = new AbortController();
  const { signal } = looking;
  try {
    const [found, placed] = await Promise.all([
      json("v1/route", { input: text, lora_retriever: settings() }, signal),
      json("v1/pool/place", { input: text }, signal),
    ]);
    showRoute(found.adapters);
    showPrompt(placed.place, found.adapters);
  } catch (error) {
    at("route").hidden = true;
    tell(at("route-state"), error);
  }
}

function showRoute(adapters) {
  at("route").hidden = !adapters.length;
  at("route-state").textContent = !adapters.length
    ? "No adapter: the base model answers alone."
    : adapters.some((adapter) => adapter.score === null) ? "Pinned." : "Found by likeness to their samples.";
  at("route").tBodies[0].replaceChildren(
    ...adapters.map(({ name, score, weight }) =>
      row(name, score === null ? "pinned" : score.toFixed(3), weight.toFixed(2), made("meter", undefined, { value: weight, "aria-label": `weight of ${name}` })),
    ),
  );
}

// Answers

function column(title) {
  const box = made("div");
  const parts = { about: made("p", ""), thought: made("div", "", { class: "thought" }), answer: made("pre", "", { class: "answer" }), speed: made("p", "waiting") };
  box.append(made("h3", title), parts.about, parts.thought, parts.answer, parts.speed);
  return [box, parts];
}

async function answer(body, parts, signal) {
  const start = performance.now();
  let first = 0;
  let usage = null;
  let reason = "";
  try {
    for await (const event of events("v1/chat/completions", body, signal)) {
      if (event.lora_retriever && !parts.about.textContent) {
        const found = event.lora_retriever.adapters;
        parts.about.textContent = found.length
          ? found.map((a) => `${a.name} ${a.score === null ? "" : a.score.toFixed(2)} × ${a.weight.toFixed(2)}`).join(", ")
          : "no adapter";
      }
      usage = event.usage ?? usage;
      for (const { delta, finish_reason } of event.choices) {
        reason = finish_reason ?? reason;
        if (delta.reasoning_content) parts.thought.append(delta.reasoning_content);
        if (delta.content) {
          first ||= performance.now();
          parts.answer.append(delta.content);
        }
      }
      if (first) parts.speed.textContent = `first text after ${Math.round(first - start)} ms`;
    }
    const seconds = (performance.now() - start) / 1000;
    const tokens = usage?.completion_tokens ?? 0;
    parts.speed.textContent = `${tokens} tokens in ${seconds.toFixed(2)} s, ${(tokens / seconds).toFixed(1)} tok/s${reason === "length" ? ", cut off at the limit" : ""}`;
  } catch (error) {
    parts.speed.textContent = "stopped";
    tell(parts.speed, error);
  }
}

async function ask() {
  const text = at("prompt").value.trim();
  if (!text || !pool) return;
  stop();
  running = new AbortController();
  const { signal } = running;
  at("stop").disabled = false;
  at("problem").textContent = "";
  at("answers-empty").hidden = true;
  const own = settings();
  const shared = {
    messages: [{ role: "user", content: text }],
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: Number(at("max_tokens").value),
    temperature: Number(at("temperature").value),
  };
  const run = made("article");
  const chosen = [own.composition, `k = ${own.top_k}`];
  if (own.adapters) chosen.push(`pinned: ${own.adapters.join(", ")}`);
  if (own.exclude_adapters) chosen.push(`without ${own.exclude_adapters.join(", ")}`);
  const pair = made("div", undefined, { class: "pair" });
  const [routed, routedParts] = column("Routed");
  const [base, baseParts] = column("Base model");
  pair.append(routed, base);
  run.append(made("p", `${text.length > 200 ? `${text.slice(0, 200)}...` : text} (${chosen.join("; ")})`), pair);
  at("runs").prepend(run);
  while (at("runs").childElementCount > MOST_RUNS) at("runs").lastElementChild.remove();
  await Promise.all([
    answer({ ...shared, model: "auto", lora_retriever: own }, routedParts, signal),
    answer({ ...shared, model: pool.model }, baseParts, signal),
  ]);
  if (running?.signal === signal) stop();
}

function stop() {
  running?.abort();
  running = null;
  at("stop").disabled = true;
}

// The engine

async function poll() {
  if (!document.hidden) {
    try {
      showStats(await json("v1/stats"));
    } catch (error) {
      at("engine").replaceChildren(made("dt", "the server cannot be reached"));
    }
  }
  setTimeout(poll, POLL_MS);
}

function showStats(stats) {
  const entries = stats.is_alive
    ? {
        running: `${stats.num_running} of ${stats.max_num_seqs}`,
        waiting: stats.num_waiting,
        "free cache": stats.num_blocks ? `${Math.round((100 * stats.num_free_blocks) / stats.num_blocks)} %` : stats.num_free_blocks,
        "cached prompts": stats.num_prompt_tokens ? `${Math.round((100 * stats.num_cached_tokens) / stats.num_prompt_tokens)} %` : "0 %",
        "adapters loaded": stats.num_resident_adapters,
        "tok/s": stats.output_tokens_per_second.toFixed(1),
      }
    : { engine: "not there" };
  at("engine").replaceChildren(
    ...Object.entries(entries).map(([name, value]) => {
      const pair = made("div");
      pair.append(made("dt", name), made("dd", value));
      return pair;
    }),
  );
}

// Keys and events

let keyAsked = null; // one question, however many requests wait for it

function askForKey(wasWrong) {
  keyAsked ??= new Promise((resolve) => {
    at("key-title").textContent = wasWrong ? "The key is wrong" : "This server asks for a key";
    at("key").value = "";
    at("key-form").onsubmit = () => {
      keyAsked = null;
      resolve(at("key").value.trim());
    };
    at("key-dialog").showModal();
  });
  return keyAsked;
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("form").requestSubmit();
  } else if (event.key === "Escape" && running) {
    stop();
  } else if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "")) {
    event.preventDefault();
    at("prompt").focus();
  }
}

async function start() {
  onKeyWanted(askForKey);
  document.addEventListener("keydown", onKey);
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  at("stop").addEventListener("click", stop);
  at("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  at("prompt").addEventListener("input", look);
  at("sample").addEventListener("change", () => {
    at("prompt").value = at("sample").value;
    look();
  });
  for (const name of ["composition", "top_k"]) at(name).addEventListener("change", look);
  at("filter").addEventListener("input", showChoices);
  at("twins-box").addEventListener("toggle", readTwins);
  try {
    await readPool();
  } catch (error) {
    tell(at("problem"), error);
  }
  poll();
}

start();
