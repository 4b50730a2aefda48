// The page of sampling reports. Every text of a report goes into the page as a text node, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { models, configs, params, prompts } = data;
const at = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const TIE = -1;
// What ends a reply: <|endoftext|>, </s>, ... It would tell the models apart in a blind vote.
const END_TOKENS = /(?:\s*(?:<\/s>|<\|[\w ]{1,40}\|>|<(?:eos|pad|end_of_turn)>))+\s*$/;

const state = {
  place: 0, // in `prompts`
  matches: [], // places of the prompts that search and filters leave
  pattern: null, // of the search, global
  hiddenModels: new Set(),
  hiddenConfigs: new Set(),
  blind: false,
  seed: 1,
  votes: {}, // by place: {choice: a model's place or TIE, models: [places], configs: [places]}
};

// ---- Small tools ----

function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children); // strings become text nodes
  return made;
}

function button(label, pressed, onClick) {
  const made = element("button", "", label);
  made.type = "button";
  made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", onClick);
  return made;
}

// The text with the search's hits marked.
function highlighted(text) {
  if (!state.pattern) return [text];
  const parts = [];
  let end = 0;
  for (const hit of text.matchAll(state.pattern)) {
    parts.push(text.slice(end, hit.index), element("mark", "", hit[0]));
    end = hit.index + hit[0].length;
  }
  return [...parts, text.slice(end)];
}

// ---- Blind order: the same for the same seed and prompt ----

function random(text) {
  let hash = 2166136261; // FNV-1a, then mulberry32
  for (const character of text) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  return () => {
    hash = (hash + 0x6d2b79f5) | 0;
    let mixed = Math.imul(hash ^ (hash >>> 15), 1 | hash);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

// Places of the models that have something to show for a prompt, in the order in which they stand.
function shownModels(place) {
  const present = new Set(shownResults(place).map(([model]) => model));
  const order = models.map((_, model) => model);
  if (state.blind) {
    const next = random(`${state.seed} ${place} ${prompts[place].text}`);
    for (let last = order.length - 1; last > 0; last--) {
      const other = Math.floor(next() * (last + 1));
      [order[last], order[other]] = [order[other], order[last]];
    }
  }
  return order.filter((model) => present.has(model));
}

function shownResults(place) {
  return prompts[place].results.filter(
    ([model, config]) => !state.hiddenModels.has(model) && !state.hiddenConfigs.has(config),
  );
}

// ---- Search and filters ----

function findMatches() {
  const query = at("search").value.trim();
  const escaped = query.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  state.pattern = query ? new RegExp(escaped, "giu") : null;
  const found = query ? new RegExp(escaped, "iu") : null; // without g: `test` starts at the front
  state.matches = [];
  for (let place = 0; place < prompts.length; place++) {
    const results = shownResults(place);
    if (!results.length) continue;
    const outputs = () => results.some(([, , texts]) => texts.some((text) => found.test(text)));
    if (!found || found.test(prompts[place].text) || outputs()) state.matches.push(place);
  }
  if (!state.matches.includes(state.place)) {
    state.place = state.matches.find((place) => place > state.place) ?? state.matches[0] ?? state.place;
  }
}

// ---- Drawing ----

function draw() {
  findMatches();
  drawFilters();
  drawList();
  drawTally();
  drawPrompt();
}

function drawFilters() {
  const chips = (names, hidden, decorate) =>
    names.map((name, place) => {
      const chip = button(name, !hidden.has(place), () => {
        if (!hidden.delete(place)) hidden.add(place);
        draw();
        at(decorate ? "models" : "configs").children[place].focus();
      });
      if (decorate) decorate(chip, place);
      return chip;
    });
  const withDot = (chip, place) => {
    chip.className = `m${place % 6}`;
    chip.prepend(element("span", "dot"));
    chip.title = `${models[place].date}\n${models[place].args}`;
  };
  at("models").replaceChildren(...chips(models.map((model) => model.name), state.hiddenModels, withDot));
  at("configs").replaceChildren(...chips(configs, state.hiddenConfigs, null));
  at("models").hidden = state.blind;
  at("seed-label").hidden = !state.blind;
  at("seed").value = state.seed;
  at("blind").setAttribute("aria-pressed", state.blind);
  at("blind").textContent = state.blind ? "Reveal" : "Blind vote";
  at("keys").textContent = state.blind
    ? "j k or ↓ ↑ prompts · 1 2 … vote · 0 tie · u undo · b reveal · / search"
    : "j k or ↓ ↑ prompts · / search · b blind vote";
  const total = prompts.length.toLocaleString("en");
  const shown = state.matches.length.toLocaleString("en");
  at("count").textContent = shown === total ? `${total} prompts` : `${shown} of ${total} prompts`;
}

function drawList() {
  at("list").replaceChildren(
    ...state.matches.map((place) => {
      const entry = element("button", "", prompts[place].text.slice(0, 120).replace(/\s+/g, " "));
      entry.type = "button";
      entry.dataset.number = place + 1;
      entry.dataset.place = place;
      entry.toggleAttribute("data-voted", place in state.votes);
      return entry;
    }),
  );
}

function drawPrompt() {
  at("list").querySelector("[aria-current]")?.removeAttribute("aria-current");
  const index = state.matches.indexOf(state.place);
  at("place").textContent = `${index + 1} / ${state.matches.length}`;
  at("previous").disabled = index <= 0;
  at("next").disabled = index >= state.matches.length - 1;
  if (index < 0) {
    at("prompt").replaceChildren(element("p", "nothing", "Nothing is left to show: change the search or the filters."));
    at("votes").replaceChildren();
    return;
  }
  const entry = at("list").children[index];
  entry.setAttribute("aria-current", "true");
  entry.scrollIntoView({ block: "nearest" });
  const { text } = prompts[state.place];
  const asked = element("div", `text asked${text.length > 200 ? " long" : ""}`, ...highlighted(text));
  const order = shownModels(state.place);
  const sections = configs.flatMap((name, config) => drawConfig(name, config, order));
  at("prompt").replaceChildren(asked, ...sections);
  drawVotes(order);
}

function drawConfig(name, config, order) {
  const results = shownResults(state.place).filter((result) => result[1] === config);
  if (!results.length) return [];
  const settings = new Set(results.map(([model]) => params[model][name]));
  const title = element("h2", "", name);
  if (!state.blind && settings.size === 1) title.append(" ", element("small", "", ...settings));
  const cards = order.map((model, position) => {
    const outputs = results.filter((result) => result[0] === model).flatMap((result) => result[2]);
    const heading = element("h3", "", state.blind ? LETTERS[position] ?? `${position + 1}` : models[model].name);
    const card = element("section", `card${state.blind ? "" : ` m${model % 6}`}`, heading);
    if (!state.blind) heading.prepend(element("span", "dot"));
    if (!state.blind && settings.size > 1 && outputs.length) card.append(element("small", "", params[model][name]));
    card.classList.toggle("better", state.votes[state.place]?.choice === model);
    card.append(...outputs.map(drawOutput));
    if (!outputs.length) card.append(element("div", "none", "no reply with these settings"));
    return card;
  });
  return [title, element("div", "cards", ...cards)];
}

function drawOutput(output) {
  const end = output.match(END_TOKENS)?.[0] ?? "";
  const text = output.slice(0, output.length - end.length).trim();
  const drawn = element("div", "text", ...(text ? highlighted(text) : [element("span", "none", "(empty)")]));
  if (end.trim() && !state.blind) drawn.append(" ", element("span", "end", ...highlighted(end.trim())));
  return drawn;
}

// ---- Votes ----

function drawVotes(order) {
  at("votes").replaceChildren();
  if (!state.blind || order.length < 2) return;
  const choice = state.votes[state.place]?.choice;
  const labels = order.map((model, position) => [LETTERS[position] ?? `${position + 1}`, model]);
  at("votes").replaceChildren(
    "Better:",
    ...[...labels, ["tie", TIE]].map(([label, model]) => button(label, choice === model, () => vote(model))),
  );
}

// The same vote twice takes it back, as does null.
function vote(choice) {
  const shown = shownModels(state.place);
  if (!state.blind || shown.length < 2 || (choice !== TIE && choice !== null && !shown.includes(choice))) return;
  if (choice === null || state.votes[state.place]?.choice === choice) {
    delete state.votes[state.place];
  } else {
    const shownConfigs = new Set(shownResults(state.place).map((result) => result[1]));
    state.votes[state.place] = { choice, models: [...shown].sort((a, b) => a - b), configs: [...shownConfigs] };
  }
  save();
  const entry = at("list").children[state.matches.indexOf(state.place)];
  entry.toggleAttribute("data-voted", state.place in state.votes);
  drawPrompt();
}

function tally() {
  return models.map(({ name }, model) => {
    const cast = Object.values(state.votes).filter((vote) => vote.models.includes(model));
    const better = cast.filter((vote) => vote.choice === model).length;
    const ties = cast.filter((vote) => vote.choice === TIE).length;
    return { model_name: name, better, ties, votes: cast.length };
  });
}

function drawTally() {
  at("tally").hidden = state.blind || !Object.keys(state.votes).length;
  at("tally-rows").replaceChildren(
    ...tally().map(({ model_name, better, ties, votes }) => {
      const share = votes ? `${((100 * better) / votes).toFixed(0)} %` : "";
      return element("tr", "", ...[model_name, better, ties, votes, share].map((cell) => element("td", "", `${cell}`)));
    }),
  );
}

function exportVotes() {
  const votes = Object.entries(state.votes).map(([place, { choice, models: compared, configs: shown }]) => ({
    prompt: prompts[place].text,
    better: choice === TIE ? null : models[choice].name,
    model_names: compared.map((model) => models[model].name),
    sampling_configs: shown.map((config) => configs[config]),
  }));
  const reports = models.map(({ name, date }) => ({ model_name: name, date }));
  const text = JSON.stringify({ seed: state.seed, reports, tally: tally(), votes }, null, 1);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "sampling_votes.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

// Votes outlive a reload, where the browser lets a page keep something.
const KEPT = `sampling votes ${data.id}`;

function save() {
  try {
    localStorage.setItem(KEPT, JSON.stringify({ seed: state.seed, votes: state.votes, blind: state.blind }));
  } catch {}
}

function restore() {
  try {
    Object.assign(state, JSON.parse(localStorage.getItem(KEPT)));
  } catch {}
}

// ---- What a person does ----

function go(steps) {
  const index = state.matches.indexOf(state.place) + steps;
  if (index < 0 || index >= state.matches.length) return;
  state.place = state.matches[index];
  drawPrompt();
  window.scrollTo(0, 0);
}

function toggleBlind() {
  state.blind = !state.blind;
  save();
  draw();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input")) {
    if (event.key !== "Escape" && event.key !== "Enter") return;
    if (event.key === "Escape" && event.target.id === "search") event.target.value = "";
    clearTimeout(waiting);
    event.target.blur(); // which is when the seed says that it has changed
    draw();
    return;
  }
  const { key } = event;
  if (key === "j" || key === "ArrowDown") go(1);
  else if (key === "k" || key === "ArrowUp") go(-1);
  else if (key === "/") at("search").focus();
  else if (key === "b") toggleBlind();
  else if (key === "0") vote(TIE);
  else if (key === "u") vote(null);
  else if (key >= "1" && key <= "9") vote(shownModels(state.place)[key - 1] ?? NaN);
  else return;
  event.preventDefault();
}

let waiting;
at("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(draw, 120);
});
at("seed").addEventListener("change", () => {
  state.seed = Number(at("seed").value) || 0;
  save();
  draw();
});
at("list").addEventListener("click", ({ target }) => {
  if (!target.dataset.place) return;
  state.place = Number(target.dataset.place);
  drawPrompt();
  window.scrollTo(0, 0);
});
at("blind").addEventListener("click", toggleBlind);
at("previous").addEventListener("click", () => go(-1));
at("next").addEventListener("click", () => go(1));
at("export").addEventListener("click", exportVotes);
at("forget").addEventListener("click", () => {
  if (!confirm("Delete all votes on these reports?")) return;
  state.votes = {};
  save();
  draw();
});
document.addEventListener("keydown", onKey);

restore();
draw();
