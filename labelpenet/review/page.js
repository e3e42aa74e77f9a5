"use strict";
// Names of files and classes are hostile until proven otherwise: they reach the page as text only.
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const token = location.hash.slice(1);
const loaded = new Map(); // place in the ranking -> promise of the photograph
let overview, place, shown, photograph, kept, chosen; // shown: the place of the photograph; place: of the one asked for
let saving = Promise.resolve(); // one verdict after the other

async function request(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { "X-Token": token } });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function load(index) {
  if (!loaded.has(index)) {
    const one = Promise.all([
      request(`photographs/${index}`).then((answer) => answer.json()),
      request(`photographs/${index}/picture`).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob), () => ""),
    ]).then(([content, picture]) => ({ ...content, picture }));
    one.catch(() => loaded.delete(index));
    loaded.set(index, one);
    for (const [old, kept] of loaded) {
      if (loaded.size <= 6) break; // thousands of photographs, of which a few are held
      loaded.delete(old);
      kept.then((past) => past !== photograph && URL.revokeObjectURL(past.picture), () => {});
    }
  }
  return loaded.get(index);
}

async function show(index) {
  place = Math.max(0, Math.min(overview.photographs.length - 1, index));
  const wanted = place;
  $("picture").classList.add("loading");
  try {
    const one = await load(wanted);
    if (wanted !== place) return; // another was asked for meanwhile
    [photograph, shown] = [one, wanted];
    $("picture").classList.remove("loading");
  } catch (error) {
    say(error.message);
    return;
  }
  say(photograph.picture ? "" : "this photograph cannot be read; drop it");
  kept = { ...photograph.kept };
  chosen = photograph.objects.length ? 0 : -1;
  $("photograph").src = photograph.picture || "data:,";
  $("outlines").setAttribute("viewBox", `0 0 ${photograph.width} ${photograph.height}`);
  draw();
  for (const near of [place + 1, place - 1]) if (near >= 0 && near < overview.photographs.length) load(near).catch(() => {});
}

const colour = (label) => overview.colours[label % overview.colours.length];
const labelOf = (index) => kept[index] ?? photograph.objects[index].label;

function draw() {
  const entry = overview.photographs[place];
  $("number").value = place + 1;
  $("name").textContent = entry.name;
  $("photograph").alt = entry.name;
  $("status").textContent = entry.status;
  $("status").className = entry.status;
  $("doubt").textContent = entry.doubt.toFixed(2);
  $("tags").textContent = photograph.tags.map((tag) => overview.classes[tag]).join(", ") || "nothing";
  const count = (status) => overview.photographs.filter((one) => one.status === status).length;
  $("counts").textContent = ["accepted", "rejected", "dropped", "open"].map((one) => `${count(one)} ${one}`).join(", ");
  $("objects").replaceChildren(...photograph.objects.map(row));
  $("outlines").replaceChildren(...photograph.objects.map(outline));
  $("one").hidden = chosen < 0;
  if (chosen >= 0) $("class").value = labelOf(chosen);
}

function row(object, index) {
  const button = document.createElement("button");
  const dot = document.createElementNS(SVG, "svg");
  const circle = document.createElementNS(SVG, "circle");
  const name = document.createElement("span");
  const score = document.createElement("small");
  dot.setAttribute("viewBox", "0 0 2 2");
  for (const [key, value] of [["cx", 1], ["cy", 1], ["r", 1], ["fill", colour(labelOf(index))]]) circle.setAttribute(key, value);
  dot.append(circle);
  name.textContent = overview.classes[labelOf(index)];
  name.className = index in kept ? "" : "rejected";
  score.textContent = object.score.toFixed(2) + (index in kept ? "" : " rejected");
  button.type = "button";
  button.setAttribute("aria-pressed", index === chosen);
  button.append(dot, name, score);
  button.addEventListener("click", () => choose(index));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function outline(object, index) {
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", object.path);
  path.setAttribute("fill", colour(labelOf(index)));
  path.setAttribute("stroke", colour(labelOf(index)));
  path.setAttribute("class", (index === chosen ? "chosen " : "") + (object.box ? "box " : "") + (index in kept ? "" : "rejected"));
  path.addEventListener("click", () => choose(index));
  return path;
}

function choose(index) {
  const count = photograph.objects.length;
  if (!count) return;
  chosen = (index + count) % count;
  draw();
  $("objects").children[chosen].scrollIntoView({ block: "nearest" });
}

function judge(status) {
  const index = place;
  const entry = overview.photographs[index];
  const one = photograph;
  const before = { status: entry.status, kept: one.kept };
  entry.status = status;
  one.kept = { ...kept };
  draw();
  const said = { status, kept: one.kept };
  const save = async () => { // the revision as the verdict before has left it
    const body = JSON.stringify({ ...said, revision: one.revision });
    one.revision = (await (await request(`photographs/${index}`, { method: "POST", body })).json()).revision;
  };
  saving = saving.then(save).catch((error) => {
    entry.status = before.status;
    one.kept = before.kept;
    loaded.delete(index); // another window may have judged it
    show(index).then(() => {
      if (shown === index) entry.status = photograph.status;
      draw();
      say(`not saved: ${error.message}`);
    });
  });
  return saving;
}

function edit(change) {
  if (chosen < 0 || shown !== place) return;
  change();
  const status = overview.photographs[place].status;
  judge(status === "accepted" ? status : "open"); // to touch an object of a rejected photograph opens it again
}

function nextOpen() {
  const all = overview.photographs;
  for (let step = 1; step <= all.length; step++) {
    const index = (place + step) % all.length;
    if (all[index].status === "open") return show(index);
  }
  say("every photograph has been judged");
}

const setClass = (label) => edit(() => { kept[chosen] = label; });
const verdict = (status) => { judge(status); if (place + 1 < overview.photographs.length) show(place + 1); };
const actions = {
  a: () => verdict("accepted"),
  r: () => verdict("rejected"),
  d: () => verdict("dropped"),
  u: () => {
    kept = Object.fromEntries(photograph.objects.map((object, index) => [index, object.label]));
    judge("open");
  },
  x: () => edit(() => { if (chosen in kept) delete kept[chosen]; else kept[chosen] = photograph.objects[chosen].label; }),
  c: () => $("class").focus(),
  h: () => $("outlines").classList.toggle("hide"),
  n: nextOpen,
  ArrowLeft: () => show(place - 1),
  ArrowRight: () => show(place + 1),
  ArrowUp: () => choose(chosen - 1),
  ArrowDown: () => choose(chosen + 1),
};

// Until the photograph that was asked for is on the page, nothing is said of it: a verdict would hold the labels of another.
const act = (key) => { if (shown === place || key.startsWith("Arrow") || key === "n") actions[key](); };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !photograph) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape" || event.key === "Enter") event.target.blur();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key; // Caps Lock
  const label = key.length === 1 ? "123456789".indexOf(key) : -1;
  if (label < 0 && !Object.hasOwn(actions, key)) return;
  event.preventDefault();
  if (event.repeat && !key.startsWith("Arrow")) return; // a key that is held down is one verdict
  if (label < 0) act(key);
  else if (label < overview.classes.length) setClass(label);
});
document.querySelectorAll("[data-key]").forEach((button) => button.addEventListener("click", () => act(button.dataset.key)));
$("class").addEventListener("change", (event) => { setClass(Number(event.target.value)); event.target.blur(); });
$("number").addEventListener("change", (event) => { if (event.target.value) show(Number(event.target.value) - 1); event.target.blur(); });

async function begin() {
  try {
    overview = await (await request("photographs")).json();
  } catch (error) {
    return say(error.message);
  }
  $("run").textContent = overview.run;
  $("file").textContent = overview.file;
  $("total").textContent = overview.photographs.length;
  $("number").max = overview.photographs.length;
  $("class").replaceChildren(...overview.classes.map((name, label) => new Option(name, label)));
  document.querySelector("main").hidden = false;
  place = -1;
  nextOpen();
  if (place < 0) show(0); // all of them have been judged
}
begin();
