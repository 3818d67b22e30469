"use strict";
// The page asks the server for what is in its form, and shows what comes. The server keeps nothing
// of a visitor: what is shown is kept here, in the address (what was asked) and in the session's
// storage (what came), so that a link tells the same story and a reload loses nothing.

const $ = (selector) => document.querySelector(selector);
const known = JSON.parse($("#known").textContent); // see render in app.py
const lang = known.language; // of the stories; the page itself is English
const form = $("#wish");
const fields = [...form.querySelectorAll("[name]")];
const still = matchMedia("(prefers-reduced-motion: reduce)");

const PAUSES = [0, 1, 2, 4, 8]; // seconds before each try to reach the server
const SLOW = 4000; // milliseconds without a word
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const GONE =
  "The server does not answer. A Space that nobody visits falls asleep and wakes when it is " +
  "opened, which takes a minute: reload the page, or try again.";

let wish = known.first.wish; // what the stories on the page were asked for with
let stories = []; // each {seed, given: text, read: how many ids those are, ids, text, state}
let coming = []; // of each {ids, text} that this connection has brought
let cards = []; // of each {article, text, count, look}
let telling = null; // the AbortController of the stories that are being told
let heard = Infinity; // when the server last said a word, where one is awaited
let inside = null; // {story, seed, read, ids, texts, chosen, layer} of what was last looked into
let looking = new AbortController(); // of what is asked about its token chosen last
let waiting; // a timer, so that an arrow key held down asks for its last token only

class Refusal extends Error {} // what the server said with a sentence; asking again is in vain

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text; // what is said twice is read twice
}

// Also what was said before: the same story, asked for again, is told again.
const sayAloud = (...what) => $("#said").replaceChildren(...what);

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)));
  });
}

async function post(path, body, signal) {
  const key = location.search; // of a private Space
  const response = await fetch(path + key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (response.ok) return response;
  const { detail } = await response.json(); // no JSON: not of our server, which may come back
  throw detail ? new Refusal(detail) : new Error("not of our server either");
}

// --- The form, the address and the session ---

const whole = (text) => text.toWellFormed?.() ?? text; // browsers of before 2024 lack it

function readForm() {
  const value = (field) =>
    field.type === "textarea" ? whole(field.value) : field.valueAsNumber;
  return Object.fromEntries(fields.map((field) => [field.name, value(field)]));
}

function writeForm(values) {
  for (const field of fields) if (field.name in values) field.value = values[field.name];
  showForm();
}

function showForm() {
  for (const output of form.querySelectorAll("output")) {
    output.value = $(`#${output.htmlFor}`).value;
  }
  const prompt = $("#prompt");
  const full = prompt.value.length >= prompt.maxLength;
  say($("#room"), full ? `That is all there is room for: ${prompt.maxLength} characters.` : "");
}

function wishOfAddress() {
  const values = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return "prompt" in values ? values : null;
}

function save() {
  const asked = { hash: location.hash, form: readForm(), wish, telling: !!telling };
  try {
    sessionStorage.storygpt = JSON.stringify({ ...asked, model: known.first, stories, inside });
  } catch {} // a browser that stores nothing, or is full: a reload tells the story again
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.storygpt);
    if (kept.hash !== location.hash) return false;
    // what greets whoever comes is the model's own: another may be shown at this address since
    if (JSON.stringify(kept.model) !== JSON.stringify(known.first)) return false;
    ({ wish, stories, inside } = kept);
    writeForm(kept.form);
    showStories();
    if (inside && history.state?.inside) openInside();
    if (kept.telling) tell();
    return true;
  } catch {
    return false;
  }
}

// --- Telling ---

function tellForm() {
  if (!form.reportValidity()) return;
  wish = readForm();
  const hash = "#" + new URLSearchParams(wish);
  history.replaceState(null, "", hash);
  if (parent !== window) parent.postMessage({ hash }, "https://huggingface.co"); // around a Space
  tell(true);
  const place = $("#status").getBoundingClientRect().top;
  if (place > innerHeight / 2) $("#status").scrollIntoView(); // a phone, or open settings
}

async function tell(wasAsked) {
  stop();
  const { signal } = (telling = new AbortController());
  $("#stop").ariaDisabled = "false";
  const isFirst = JSON.stringify(wish) === JSON.stringify(known.first.wish);
  const source = isFirst ? replay : ask;
  let message = GONE;
  let begun = false;
  try {
    for (const pause of PAUSES) {
      if (pause) {
        heard = Infinity;
        say($("#status"), "The connection broke. Reconnecting …");
        await sleep(1000 * pause, signal);
      }
      try {
        for await (const event of source(signal)) {
          heard = performance.now();
          if (event.place) say($("#status"), `You are number ${event.place} in the queue.`);
          else if (event.error) throw new Refusal(event.error);
          else if (event.told) grow(event.told);
          else begun = begin(event, begun);
        }
        if (begun && stories.every((story) => story.state !== "telling")) {
          message = "";
          break;
        }
      } catch (error) {
        if (signal.aborted || error instanceof Refusal) throw error;
      }
    }
  } catch (error) {
    if (signal.aborted) return;
    message = error.message;
  }
  end(message);
  if (begun && (wasAsked || !isFirst)) sayAloud(...stories.flatMap(aloud));
}

async function* replay(signal) {
  for (const event of known.first.events) {
    if (!still.matches) await sleep(35, signal);
    yield event;
  }
}

async function* ask(signal) {
  say($("#status"), "Asking …");
  heard = performance.now();
  const response = await post("stories", wish, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) yield JSON.parse(event.slice("data: ".length));
  }
}

function begin({ given, ids, unread }, again) {
  coming = Array.from({ length: wish.num_samples }, () => ({ ids: [...ids], text: "" }));
  if (again) return true; // the same stories, from the beginning
  stories = coming.map((story, i) => {
    return { ...story, seed: wish.seed + i, given, read: ids.length, state: "telling" };
  });
  const all = (ids.length + unread).toLocaleString("en");
  let hint = "";
  if (unread) hint = `The model sees only the last ${ids.length} of these ${all} tokens.`;
  else if (given.endsWith(" "))
    hint = "It ends in a space, which tokens begin with: without it the story is better.";
  say($("#room"), hint);
  showStories();
  return true;
}

function grow(told) {
  say($("#status"), "Telling …");
  told.forEach(([ids, text, state], i) => {
    coming[i].ids.push(...ids);
    coming[i].text += text;
    if (coming[i].text.length < stories[i].text.length) return; // told again, and not so far yet
    Object.assign(stories[i], coming[i], { state });
    showStory(i);
  });
}

function stop() {
  if (!telling) return;
  telling.abort();
  end("Stopped.");
}

function end(message) {
  telling = null;
  heard = Infinity;
  $("#stop").ariaDisabled = "true";
  for (const story of stories) if (story.state === "telling") story.state = "stopped";
  stories.forEach((_, i) => showStory(i));
  say($("#status"), message);
  save();
}

setInterval(() => {
  const seconds = Math.round((performance.now() - heard) / 1000);
  if (1000 * seconds >= SLOW) {
    say($("#status"), `The server is slow: not a word for ${seconds} seconds. Still waiting …`);
  }
}, 1000);

// --- Stories ---

function showStories() {
  cards = stories.map((story, i) => {
    const button = (textContent) => {
      const ariaLabel = `${textContent}: seed ${story.seed}`;
      return make("button", { type: "button", textContent, ariaLabel });
    };
    const text = document.createTextNode("");
    const count = make("span");
    const copied = button("Copy");
    const look = button("Look inside");
    copied.onclick = () => copy(story.given + stories[i].text, copied);
    look.onclick = () => lookInside(i);
    const given = make("mark", { textContent: story.given });
    const paragraph = make("p", { dir: "auto", lang, translate: false }, given, text);
    const article = make("article", {}, paragraph, make("footer", {}, count, copied, look));
    return { article, text, count, look };
  });
  $("#stories").replaceChildren(...cards.map((card) => card.article));
  stories.forEach((_, i) => showStory(i));
}

function showStory(i) {
  const story = stories[i];
  const { article, text, count } = cards[i];
  text.data = story.text;
  article.className = story.state === "telling" ? "telling" : "";
  say(count, `Seed ${story.seed} · ${story.ids.length - story.read} tokens · ${story.state}`);
}

const aloud = ({ given, text, seed, state }) => [
  make("span", { lang, textContent: given + text }),
  ` (Seed ${seed}: ${state}.)\n`,
];

async function copy(text, button) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // no such permission, or no https
    const field = make("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    copied = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  if (!copied) return say($("#status"), "This browser does not let the page copy.");
  const name = button.textContent;
  if (name === "Copied") return;
  button.textContent = "Copied";
  sayAloud("Copied");
  setTimeout(() => (button.textContent = name), 2000);
}

// --- Looking inside ---

function lookInside(i) {
  const { seed, read, ids } = stories[i];
  const chosen = Math.min(read, ids.length - 1);
  const layer = inside?.layer ?? known.layers;
  inside = { story: i, seed, read, ids: [...ids], chosen, layer };
  history.pushState({ inside: true }, ""); // so that the browser's way back is one, too
  openInside();
  scrollTo(0, 0);
}

async function openInside() {
  $("#telling").hidden = true;
  $("#inside").hidden = false;
  $("#choice").hidden = true;
  $("#tokens").replaceChildren();
  say($("#whose"), `Inside the story of seed ${inside.seed}`);
  $("#whose").focus({ preventScroll: true });
  $(`#layers [value="${inside.layer}"]`).checked = true;
  save();
  const answer = await askInside("tokens", { ids: inside.ids }, newLook());
  if (!answer) return;
  const { texts, probabilities } = await answer.json();
  inside.texts = texts;
  showTokens(probabilities);
  choose($("#tokens").children[inside.chosen]);
}

function closeInside() {
  if ($("#inside").hidden) return;
  looking.abort();
  $("#inside").hidden = true;
  $("#telling").hidden = false;
  cards[inside.story]?.look.focus();
}

function newLook() {
  looking.abort();
  looking = new AbortController();
  return looking.signal;
}

async function askInside(path, body, signal) {
  const slow = setTimeout(() => say($("#looking"), "The server is slow. Still waiting …"), SLOW);
  try {
    const answer = await post(path, body, signal);
    say($("#looking"), "");
    return answer;
  } catch (error) {
    if (!signal.aborted) say($("#looking"), error instanceof Refusal ? error.message : GONE);
  } finally {
    clearTimeout(slow);
  }
}

function percent(p) {
  return p < 1e-5 ? "< 0.001 %" : `${(100 * p).toPrecision(3)} %`;
}

function spell(id, text) {
  if (id === known.end) return make("code", {}, make("em", { textContent: "the end" }));
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" }; // what has no ink can be seen
  const isPart = text === "" || text === "\ufffd"; // of a character
  if (isPart) return make("code", {}, make("em", { textContent: "part of a character" }));
  const parts = text.split(/([ \n\t\r])/).map((part) => {
    return part in signs ? make("i", { textContent: signs[part] }) : part;
  });
  return make("code", { dir: "auto" }, ...parts);
}

const spelled = (i) => spell(inside.ids[i], inside.texts[i]);

function showTokens(probabilities) {
  const { ids, texts, read } = inside;
  const options = texts.map((text, i) => {
    const p = probabilities[i];
    const option = make("span", { lang, role: "option", tabIndex: -1, ariaSelected: "false" });
    const bound = make("em", { lang: "en", textContent: i ? "the end" : "the beginning" });
    option.append(ids[i] === known.end ? bound : text.replaceAll("\n", "↵\n") || "·");
    option.className = p === null ? "first" : i < read ? "given" : "told";
    option.title = p === null ? "nothing came before it" : percent(p);
    if (p !== null) option.style.setProperty("--p", `${100 * p}%`);
    return option;
  });
  $("#tokens").replaceChildren(...options);
  const word = firstWordOfSeveral(texts).map((piece) => piece.trim());
  const sum = word.map((piece) => `“${piece}”`).join(" + ");
  say($("#pieces"), word.length ? `Here “${word.join("")}” is ${word.length}: ${sum}.` : "");
}

function firstWordOfSeveral(texts) {
  const words = [];
  for (const text of texts) {
    const goesOn = /^[\p{L}\p{M}]/u.test(text) && /[\p{L}\p{M}]$/u.test(words.at(-1)?.at(-1) ?? "");
    if (goesOn) words.at(-1).push(text);
    else words.push([text]);
  }
  return words.find((word) => word.length > 1) ?? [];
}

function choose(option, focused = false) {
  const options = [...$("#tokens").children];
  for (const other of options) {
    other.tabIndex = other === option ? 0 : -1;
    other.ariaSelected = String(other === option);
  }
  if (focused) option.focus();
  inside.chosen = options.indexOf(option);
  save();
  newLook();
  clearTimeout(waiting);
  waiting = setTimeout(showChoice, 80);
}

async function showChoice() {
  const signal = newLook();
  const { ids, chosen, read, layer } = inside;
  $("#choice").hidden = chosen === 0;
  if (chosen === 0) return say($("#looking"), "Nothing came before the first token to choose by.");
  const asked = { ids: ids.slice(0, chosen + 1), index: chosen };
  const answer = await askInside("likeliest", asked, signal);
  if (!answer) return;
  const { likeliest, told, start } = await answer.json();
  if (signal.aborted) return;
  $("#place").replaceChildren("In the place of ", spelled(chosen));
  say($("#who"), chosen < read ? "you wrote" : "came");
  const bars = likeliest.map(([id, text, p]) => bar(spell(id, text), p, id === ids[chosen]));
  const [rank, p] = told;
  if (rank > likeliest.length) {
    bars.push(bar(spelled(chosen), p, true, `no. ${rank.toLocaleString("en")}: `));
  }
  $("#bars").replaceChildren(...bars);
  const seen = ids.slice(start, chosen);
  const weights = await askInside("attention", { ids: seen, layer: layer - 1 }, signal);
  $("#where").hidden = !weights;
  if (weights) showHeads(new Uint16Array(await weights.arrayBuffer()), start, seen.length);
}

function bar(token, p, isTold, rank = "") {
  const length = make("s");
  length.style.width = `${100 * p}%`;
  const number = make("b", { textContent: rank + percent(p) });
  return make("li", { className: isTold ? "told" : "" }, token, make("span", {}, length), number);
}

function showHeads(weights, start, length) {
  const figures = Array.from({ length: known.heads }, (_, head) => {
    const own = weights.subarray(head * length ** 2, (head + 1) * length ** 2);
    return showHead(head + 1, own, start, length);
  });
  say($("#layer"), `Where the heads of layer ${inside.layer} looked`);
  $("#heads").replaceChildren(...figures);
}

function showHead(head, weights, start, length) {
  const last = weights.subarray(-length);
  const share = (row, column) => weights[row * length + column] / 65535;
  const map = draw(weights, length, "map");
  const strip = draw(last, length, "strip");
  const most = [...last.keys()].sort((a, b) => last[b] - last[a]).slice(0, 3);
  const caption = make("figcaption", {}, `Head ${head}: `);
  for (const i of most) {
    if (i !== most[0]) caption.append(", ");
    caption.append(spelled(start + i), ` ${(100 * share(length - 1, i)).toFixed(0)} %`);
  }
  map.role = strip.role = "img";
  map.ariaLabel = `What head ${head} took from where; arrow keys name the tokens`;
  strip.ariaLabel = `The last row of head ${head}`;
  map.tabIndex = 0;

  // The cell under the mouse, or where the arrow keys have moved to.
  const hint = make("p", { className: "hint", ariaLive: "polite" });
  let cell = { row: length - 1, column: length - 1 };
  const name = (row, column) => {
    const inRange = (i) => Math.max(0, Math.min(length - 1, i));
    cell = { row: inRange(row), column: inRange(column) };
    const at = spelled(start + cell.row);
    const from = spelled(start + cell.column);
    const p = percent(share(cell.row, cell.column));
    if (cell.column > cell.row) hint.replaceChildren(from, " comes after ", at);
    else hint.replaceChildren("at ", at, `: ${p} from `, from);
  };
  const cellOf = (offset, size) => Math.floor((offset / size) * length);
  const point = ({ target, offsetX, offsetY }) => {
    const row = target === map ? cellOf(offsetY, map.clientHeight) : length - 1;
    name(row, cellOf(offsetX, target.clientWidth));
  };
  for (const picture of [map, strip]) {
    picture.onpointermove = picture.onpointerdown = point; // a finger does not move
  }
  map.onkeydown = (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    name(cell.row + step[0], cell.column + step[1]);
  };
  return make("figure", {}, map, strip, caption, hint);
}

function draw(weights, columns, className) {
  const rows = weights.length / columns;
  const canvas = make("canvas", { width: columns, height: rows, className });
  const context = canvas.getContext("2d");
  const picture = context.createImageData(columns, rows);
  for (let row = 0; row < rows; row++) {
    const most = Math.max(...weights.subarray(row * columns, (row + 1) * columns));
    for (let i = row * columns; i < (row + 1) * columns; i++) {
      // beside the most of its row, and rooted, so that small ones can be seen
      picture.data.set([13, 148, 136, 255 * Math.sqrt(weights[i] / most)], 4 * i);
    }
  }
  context.putImageData(picture, 0, 0);
  return canvas;
}

// --- What is done when ---

form.onsubmit = (event) => (event.preventDefault(), tellForm());
form.oninput = () => (showForm(), save());
form.addEventListener("invalid", () => ($("details").open = true), true); // or nobody sees where
$("#prompt").onkeydown = (event) => {
  // 229: the Enter that ends a word of Japanese or Chinese, which Safari calls composed already
  const composes = event.isComposing || event.keyCode === 229;
  if (event.key !== "Enter" || event.shiftKey || composes) return;
  event.preventDefault();
  form.requestSubmit();
};
$("#openings").onclick = (event) => {
  if (event.target.tagName !== "BUTTON") return;
  writeForm({ prompt: event.target.textContent });
  tellForm();
};
$("#stop").onclick = stop;
$("#another").onclick = () => {
  const { seed, num_samples } = readForm();
  writeForm({ seed: seed + num_samples });
  tellForm();
};
$("#link").onclick = () => {
  const hash = new URLSearchParams(wish);
  copy(`${location.origin}${location.pathname}#${hash}`, $("#link"));
};
$("#back").onclick = () => history.back();
$("#tokens").onclick = (event) => {
  const option = event.target.closest("[role=option]");
  if (option) choose(option, true);
};
$("#tokens").onkeydown = (event) => {
  const options = [...$("#tokens").children];
  const at = options.indexOf(document.activeElement);
  const forward = getComputedStyle($("#tokens")).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
  const backward = forward === "ArrowLeft" ? "ArrowRight" : "ArrowLeft";
  const to = { Home: 0, End: options.length - 1, [backward]: at - 1, [forward]: at + 1 }[event.key];
  if (at < 0 || !options[to]) return;
  event.preventDefault();
  choose(options[to], true);
};
$("#layers").onchange = (event) => {
  inside.layer = Number(event.target.value);
  save();
  showChoice();
};
onpopstate = () => (history.state?.inside && inside ? openInside() : closeInside());
onhashchange = arrive;
onpagehide = save;

// --- Whoever comes ---

const theme = new URLSearchParams(location.search).get("__theme"); // of the page around a Space
if (theme) document.documentElement.dataset.theme = theme;
for (let layer = 1; layer <= known.layers; layer++) {
  const radio = make("input", { type: "radio", name: "layer", value: layer });
  $("#layers").append(make("label", {}, radio, String(layer)));
}

function arrive() {
  closeInside();
  history.replaceState(null, ""); // what was looked into here is no more
  writeForm({ ...known.first.wish, ...wishOfAddress() });
  wish = form.reportValidity() ? readForm() : known.first.wish; // a link may say anything
  tell();
}

if (!restore()) arrive();
