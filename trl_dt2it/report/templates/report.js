"use strict";
// The gallery: filters, verdicts by keyboard, and a file of corrections. All text goes in as text, never as markup.
(() => {
  const holder = document.getElementById("gallery-data");
  if (!holder) return;
  const { pairs, images, source_set: sourceSet, report } = JSON.parse(holder.textContent);
  const PAGE = 50;
  const byId = (id) => document.getElementById(id);
  const cards = byId("cards");
  const filters = ["source", "state", "since", "verdict", "low", "high", "text"];
  const controls = Object.fromEntries(filters.map((name) => [name, byId(`filter-${name}`)]));
  const storageKey = `trl-dt2it ${report}`;
  let verdicts = new Map();
  let found = [];
  let shown = 0;
  let current = -1;

  try {
    verdicts = new Map(JSON.parse(localStorage.getItem(storageKey) || "[]"));
  } catch { /* a browser that stores nothing forgets the verdicts when the page is closed */ }

  const make = (tag, className, text) => {
    const one = document.createElement(tag);
    if (className) one.className = className;
    if (text !== undefined) one.textContent = text;
    return one;
  };
  const number = (value) => (value === null ? "–" : value.toFixed(2));
  const known = (values) => [...new Set(values)];

  for (const name of ["source", "state", "since"]) {
    for (const value of known(pairs.map((pair) => pair[name]))) {
      const option = make("option", "", value);
      option.value = value;
      controls[name].append(option);
    }
  }
  // What the filter by text looks into, made once.
  const texts = pairs.map((pair) =>
    [pair.id, pair.prompt, pair.chosen, pair.rejected, pair.reason].join("\n").toLowerCase());

  function matches(pair, place) {
    const value = (name) => controls[name].value;
    const verdict = verdicts.get(pair.id) || "none";
    const low = value("low") === "" ? -Infinity : Number(value("low"));
    const high = value("high") === "" ? Infinity : Number(value("high"));
    return (!value("source") || pair.source === value("source"))
      && (!value("state") || pair.state === value("state"))
      && (!value("since") || pair.since === value("since"))
      && (!value("verdict") || verdict === value("verdict"))
      && ((low === -Infinity && high === Infinity)
        || (pair.strength !== null && pair.strength >= low && pair.strength <= high))
      && texts[place].includes(value("text").trim().toLowerCase());
  }

  function answer(pair, side) {
    const isPreferred = (side === "chosen") !== pair.flipped;
    const box = make("div", isPreferred && pair.kept ? "answer preferred" : "answer");
    const head = make("p", "answer-head");
    head.append(make("span", "", side === "chosen" ? "Source: better" : "Source: worse"));
    if (pair.kept) head.append(make("span", "now", isPreferred ? "Now: better" : "Now: worse"));
    const last = [...pair.history].reverse().find((one) => one.scores.length);
    if (last) {
      const rewards = last.scores.map((one) => number(one[side === "chosen" ? 1 : 2]));
      const reward = make("span", "reward", `reward ${rewards.join(", ")}`);
      reward.title = last.scores.map((one) => one[0]).join("; ");
      head.append(reward);
    }
    box.append(head, make("p", "text", pair[side]));
    return box;
  }

  function historyOf(pair) {
    const details = make("details", "history");
    details.append(make("summary", "", "All that was said of it"));
    const table = make("table");
    const head = make("tr");
    for (const title of ["stage", "action", "why", "strength", "reward better", "reward worse"]) {
      head.append(make("th", "", title));
    }
    table.append(head);
    for (const one of pair.history) {
      const row = make("tr");
      const votes = one.votes.map(([name, a, b]) => `${name}: ${a ?? "–"}, ${b ?? "–"}`).join("; ");
      row.append(make("td", "", one.step), make("td", "", one.action));
      row.append(make("td", "", votes ? `${one.reason} (${votes})` : one.reason), make("td", "", number(one.strength)));
      row.append(make("td", "", one.scores.map((score) => number(score[1])).join(", ")));
      row.append(make("td", "", one.scores.map((score) => number(score[2])).join(", ")));
      table.append(row);
    }
    const box = make("div", "table");
    box.append(table);
    details.append(box);
    return details;
  }

  const MEANING = {
    flipped: ["the flip is right", "the label goes back to the source's"],
    dropped: ["it stays out", "it comes back as it stood"],
    kept: ["the label is right", "the answers change places"],
    relabelled: ["the judges are right", "the answers change places"],
  };

  function card(pair, place) {
    const item = make("li", `card ${pair.state}`);
    item.tabIndex = -1;
    item.dataset.id = pair.id;
    const head = make("header");
    head.append(make("span", "rank", String(place + 1)), make("span", `state ${pair.state}`, pair.state));
    head.append(make("span", "strength", `strength ${number(pair.strength)}`));
    head.append(make("span", "reason", `${pair.reason}, ${pair.since === "source" ? "never changed" : pair.since}`));
    head.append(make("span", "name", `${pair.source} · ${pair.id}`));
    const pictures = make("div", "pictures");
    for (const image of pair.images) {
      if (typeof image === "number") {
        const picture = make("img");
        picture.src = images[image];
        picture.alt = "";
        picture.decoding = "async";
        pictures.append(picture);
      } else {
        pictures.append(make("span", "no-picture", image));
      }
    }
    const body = make("div", "body");
    body.append(make("p", "prompt text", pair.prompt));
    const answers = make("div", "answers");
    answers.append(answer(pair, "chosen"), answer(pair, "rejected"));
    body.append(answers);
    const verdict = make("div", "verdict");
    for (const [place, name] of ["accept", "wrong", "unsure"].entries()) {
      const button = make("button", "", name);
      button.type = "button";
      button.dataset.verdict = name;
      button.title = MEANING[pair.state][place] || "nothing is done";
      button.addEventListener("click", () => {
        current = found.indexOf(pair);
        judge(name, false);
      });
      verdict.append(button);
    }
    body.append(verdict, historyOf(pair));
    item.append(head, pictures, body);
    item.addEventListener("click", () => select(found.indexOf(pair), false));
    mark(item, pair);
    return item;
  }

  function mark(item, pair) {
    const verdict = verdicts.get(pair.id) || "";
    item.dataset.judged = verdict;
    for (const button of item.querySelectorAll("[data-verdict]")) {
      button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
    }
  }

  function showMore() {
    const until = Math.min(found.length, shown + PAGE);
    for (; shown < until; shown += 1) cards.append(card(found[shown], shown));
    byId("more").hidden = shown >= found.length;
  }

  function tell() {
    byId("gallery-count").textContent = `${found.length} of ${pairs.length} pairs shown`;
    const flips = pairs.filter((pair) => pair.state === "flipped").slice(0, 100);
    const done = flips.filter((pair) => verdicts.has(pair.id)).length;
    byId("gallery-progress").textContent =
      flips.length ? `${done} of the ${flips.length} strongest flips judged, ${verdicts.size} verdict${verdicts.size === 1 ? "" : "s"} in all` : "";
    byId("export").disabled = verdicts.size === 0;
  }

  function refresh() {
    found = pairs.filter(matches);
    shown = 0;
    current = -1;
    cards.replaceChildren();
    showMore();
    tell();
  }

  function select(place, scroll) {
    if (place < 0 || place >= found.length) return;
    while (shown <= place) showMore();
    cards.querySelector(".current")?.classList.remove("current");
    current = place;
    const item = cards.children[place];
    item.classList.add("current");
    if (scroll) {
      item.focus({ preventScroll: true });
      item.scrollIntoView({ block: "nearest" });
    }
  }

  function judge(verdict, advance) {
    if (current < 0) return;
    const pair = found[current];
    if (verdict) verdicts.set(pair.id, verdict);
    else verdicts.delete(pair.id);
    try {
      localStorage.setItem(storageKey, JSON.stringify([...verdicts]));
    } catch { /* see above */ }
    mark(cards.children[current], pair);
    tell();
    select(advance ? Math.min(current + 1, found.length - 1) : current, advance);
  }

  function corrections() {
    const entries = [];
    for (const pair of pairs) {
      const verdict = verdicts.get(pair.id);
      if (!verdict) continue;
      const entry = { pair_id: pair.id, verdict };
      if (verdict === "accept") Object.assign(entry, { flipped: pair.flipped, kept: pair.kept });
      if (verdict === "wrong") Object.assign(entry, { flipped: pair.kept ? !pair.flipped : pair.flipped, kept: true });
      entries.push(entry);
    }
    return { format: "trl-dt2it corrections", version: 1, source_set: sourceSet, corrections: entries };
  }

  byId("export").addEventListener("click", () => {
    const content = JSON.stringify(corrections(), null, 2) + "\n";
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
    link.download = "corrections.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  byId("more").addEventListener("click", showMore);
  for (const control of Object.values(controls)) control.addEventListener("input", refresh);
  const form = document.querySelector(".filters");
  form.addEventListener("reset", () => setTimeout(refresh));
  form.addEventListener("submit", (event) => event.preventDefault());

  const KEYS = { a: "accept", w: "wrong", u: "unsure", x: "" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "j") select(current + 1, true);
    else if (event.key === "k") select(Math.max(0, current - 1), true);
    else if (event.key in KEYS && current >= 0) judge(KEYS[event.key], event.key !== "x");
    else return;
    event.preventDefault();
  });
  refresh();
})();
