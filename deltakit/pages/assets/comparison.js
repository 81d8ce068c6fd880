// What `deltakit compare --html` shows: the deltas, matrices over all pairs, and a pair in its parts.

const names = data.deltas.map((delta, i) => `${i + 1}\u00a0·\u00a0${delta.short}`);
const several = (count, noun) => `${format.count(count)} ${noun}${count === 1 ? "" : "s"}`;
const signed = (x) => (Math.abs(x) < 5e-4 ? "0" : `${x > 0 ? "+" : "−"}${Math.abs(x).toFixed(3)}`);
const title = (pair) => `${names[pair.first]} and ${names[pair.second]}`;

/** Counts of two deltas on some tensors and the ratios that follow; null where there is none. */
function overlap([first, second, shared, expected, signs, conflicts, cosine]) {
  const share = (part, whole) => (whole ? part / whole : 0);
  return { first, second, shared, expected, conflicts, cosine, signs,
    jaccard: share(shared, first + second - shared),
    ofFirst: share(shared, first), ofSecond: share(shared, second),
    lift: expected ? shared / expected : null,
    opposed: signs ? conflicts / signs : null };
}

for (const pair of data.pairs) pair.met = pair.apart ? null : overlap(pair.total);

// Summary

/** The pair that is highest in `of`, as text for a card. */
function highest(of, write) {
  const known = data.pairs.filter((pair) => pair.met && of(pair.met) !== null);
  if (!known.length) return { value: "unknown" };
  const best = known.reduce((a, b) => (of(b.met) > of(a.met) ? b : a));
  return { value: write(of(best.met)), note: data.pairs.length > 1 ? title(best) : null };
}

function baseCard() {
  const verdicts = data.pairs.map((pair) => pair.base);
  if (verdicts.includes("different")) return { value: "different", note: "some deltas belong to other bases than others" };
  if (verdicts.includes("unknown")) return { value: "not known", note: "not all tell whether they belong to one" };
  return { value: "the same", note: "of all deltas" };
}

function summary() {
  const many = data.pairs.length > 1;
  if (data.warning) add(el("p", { class: "warning", role: "note" }, el("strong", {}, "Warning: "), data.warning));
  add(cards([
    { label: many ? "Largest overlap (Jaccard)" : "Overlap (Jaccard)", ...highest((met) => met.jaccard, format.percent) },
    { label: many ? "Most sign conflicts" : "Sign conflicts", ...highest((met) => met.opposed, format.percent) },
    { label: many ? "Largest cosine" : "Cosine of the changes", ...highest((met) => met.cosine, signed) },
    { label: "Base", ...baseCard() },
  ]));
  add(section("Deltas", cards(data.deltas.map((delta, i) => ({
    label: names[i],
    value: several(delta.entries, "entry").replace("entrys", "entries"),
    note: `${several(delta.tensors, "tensor")} · ${delta.label}`,
  })))));
}

// Matrices

/** One value for each two deltas. of(met, row, column, pair): null where it is not known. */
function matrix(heading, about, of, write, scale) {
  const cell = (r, c) => {
    const pair = r === c ? null : between(r, c);
    return pair ? of(pair, pair.first === r) : null;
  };
  const values = names.map((_, r) => names.map((_, c) => cell(r, c)));
  const sizes = values.flat().filter((value) => value !== null).map(Math.abs);
  const most = sizes.reduce((a, b) => Math.max(a, b), 0) || 1;
  return figure({ title: heading, about, node: heatmap({
    rows: names, columns: names, values, format: write, label: heading, empty: "the same delta",
    scale: { label: scale.label, min: scale.signs ? -most : 0, max: most },
    holds: (r, c) => r !== c, pick: (r, c) => show(between(r, c), true),
  }) });
}

function between(one, other) {
  const first = Math.min(one, other), second = Math.max(one, other), size = names.length;
  return data.pairs[first * size - (first * (first + 1)) / 2 + second - first - 1];
}

function matrices() {
  const of = (read) => (pair, ahead) => (pair.met ? read(pair.met, ahead) : null);
  const made = [
    matrix("Overlap of supports", "Shared entries as a share of all that either has (Jaccard).",
      of((met) => met.jaccard), format.percent, { label: "Jaccard" }),
    matrix("Containment", "Share of the row's entries that the column has too.",
      of((met, ahead) => (ahead ? met.ofFirst : met.ofSecond)), format.percent, { label: "contained" }),
    matrix("Sign conflicts", "Shared entries moved in opposite directions, as a share of those whose signs are known.",
      of((met) => met.opposed), format.percent, { label: "in conflict" }),
    matrix("Cosine of the changes", "Of the deltas as vectors of all weights: 1 points the same way, −1 the opposite way.",
      of((met) => met.cosine), signed, { label: "cosine", signs: true }),
  ];
  if (data.pairs.some((pair) => pair.folded_cosine !== null)) {
    made.push(matrix("Cosine of adapters", "Of the changes that adapters make to the base's weights, where it can be told without the base.",
      (pair) => pair.folded_cosine, signed, { label: "cosine", signs: true }));
  }
  add(section("Matrices",
    el("p", { class: "soft" }, "Pick a cell to see that pair in its parts, with a click or with the arrow keys and Enter."),
    el("div", { class: names.length <= 5 ? "matrices" : null }, made), allPairs()));
}

const HEADS = ["Shared", "By chance", "Jaccard", "Of 1st", "Of 2nd", "Conflicts", "Share", "Cosine"];

function figures(met) {
  if (!met) return HEADS.map(() => "–");
  return [format.count(met.shared), format.number(met.expected), format.percent(met.jaccard),
    format.percent(met.ofFirst), format.percent(met.ofSecond),
    met.signs || !met.shared ? format.count(met.conflicts) : "unknown",
    met.opposed === null ? "–" : format.percent(met.opposed),
    met.cosine === null ? "–" : signed(met.cosine)];
}

function allPairs() {
  const rows = data.pairs.map((pair) => [title(pair), ...figures(pair.met), pair.base]);
  return el("details", {}, el("summary", {}, "All pairs as a table"),
    table(["Pair", ...HEADS, "Base"], rows, { right: [1, 2, 3, 4, 5, 6, 7, 8], label: "All pairs" }));
}

// One pair

const ORDERS = {
  "model": null,
  "most shared": (met) => met.shared,
  "most above chance": (met) => met.lift ?? 0,
  "most conflicts": (met) => met.conflicts,
};
const BASES = { same: "Both belong to the same base", different: "They belong to different bases", unknown: "Whether they belong to one base is not known" };
const chosen = { by: "kind", order: "model", pair: data.pairs[0] };
const detail = el("div", { class: "stack" });
const select = el("select", { id: "pair-choice", onchange: () => show(data.pairs[select.selectedIndex]) },
  data.pairs.map((pair) => el("option", {}, title(pair))));

/** Show a pair; with `go` its heading gets the focus, as a cell above was picked. */
function show(pair, go = false) {
  chosen.pair = pair;
  select.selectedIndex = data.pairs.indexOf(pair);
  for (const cell of document.querySelectorAll(".heat td[role=gridcell]")) {
    const [r, c] = [cell.parentNode.rowIndex - 1, cell.cellIndex - 1];
    if (r !== c && between(r, c) === pair) cell.setAttribute("aria-selected", "true");
    else cell.removeAttribute("aria-selected");
  }
  const heading = el("h3", { tabindex: -1 }, title(pair));
  detail.replaceChildren(heading, el("p", {}, `${BASES[pair.base]}: ${pair.evidence}.`),
    ...(pair.apart ? apart(pair) : meeting(pair)));
  if (!go) return;
  heading.focus({ preventScroll: true });
  heading.closest("section").scrollIntoView();
}

function apart(pair) {
  const told = pair.folded_cosine === null ? null : [{ label: "Cosine of the changes to the base's weights", value: signed(pair.folded_cosine) }];
  return [el("p", {}, `Their entries stand at different weights and are not compared one by one: ${pair.apart}.`), ...(told ? [cards(told)] : [])];
}

function meeting(pair) {
  const { met } = pair;
  const told = [
    { label: "Shared entries", value: format.count(met.shared),
      note: `${format.number(met.expected)} by chance${met.lift === null ? "" : `, ${format.number(met.lift)} times that`}` },
    { label: "Overlap (Jaccard)", value: format.percent(met.jaccard),
      note: `${format.percent(met.ofFirst)} of the first, ${format.percent(met.ofSecond)} of the second` },
    { label: "Sign conflicts", value: met.opposed === null ? "–" : format.percent(met.opposed),
      note: met.opposed === null ? "no shared entry with known signs"
        : `${format.count(met.conflicts)} of ${format.count(met.signs)} shared; ${format.percent(pair.collision)} of the smaller delta` },
    { label: "Cosine of the changes", value: met.cosine === null ? "–" : signed(met.cosine),
      note: pair.unknown ? `${format.count(pair.unknown)} changes are not known or not finite` : null },
  ];
  return [cards(told), partsTable(pair)];
}

/** The pair's parts: counts, and shared entries beside chance on a common logarithmic scale. */
function partsTable(pair) {
  const { names: kept, others } = data.parts.find((part) => part.by === chosen.by);
  const rows = pair[chosen.by].flatMap((row, i) => (row ? [{ name: kept[i] ?? null, met: overlap(row) }] : []));
  const rest = rows.filter((row) => row.name === null), parts = rows.filter((row) => row.name !== null);
  const size = ORDERS[chosen.order];
  if (size) parts.sort((a, b) => size(b.met) - size(a.met));
  const listed = [...parts, ...rest], dot = dots(listed.map((row) => row.met));
  const cells = listed.map(({ name, met }) => {
    const [shared, expected, , , , ...signs] = figures(met);
    return [name ?? el("em", {}, "all others"), format.count(met.first), format.count(met.second), dot(met), shared, expected, ...signs];
  });
  const left = others ? `The ${format.count(kept.length)} ${chosen.by}s with the most shared entries over all pairs are listed; ${format.count(others)} more are counted together, to keep this page small. ` : "";
  return el("div", { class: "stack" },
    el("p", { class: "soft" }, `${left}The dot is what both share and the bar what they would by chance, on a logarithmic scale.`),
    table([`By ${chosen.by}`, "1st", "2nd", "Against chance", "Shared", "By chance", "Conflicts", "Share", "Cosine"], cells,
      { right: [1, 2, 4, 5, 6, 7, 8], label: `${title(pair)} by ${chosen.by}` }));
}

/** Draws one row's shared entries beside chance, on a scale that fits all `rows`. */
function dots(rows) {
  const width = 96, told = rows.flatMap((met) => [met.shared, met.expected]).filter((x) => x > 0);
  const least = told.reduce((a, b) => Math.min(a, b), 1), most = told.reduce((a, b) => Math.max(a, b), 10);
  const place = scale(least, most, 6, width - 6, true);
  return ({ shared, expected }) => svg("svg", { class: "dots", width, height: 16, viewBox: `0 0 ${width} 16`, "aria-hidden": "true" },
    svg("line", { class: "axis", x1: 0, x2: width, y1: 8, y2: 8 }),
    expected > 0 ? svg("line", { class: "chance", x1: place(expected), x2: place(expected), y1: 1, y2: 15 }) : null,
    shared > 0 ? svg("circle", { class: "shared", cx: place(shared), cy: 8, r: 4.5 }) : null);
}

function onePair() {
  const redraw = (key) => (value) => { chosen[key] = value; show(chosen.pair); };
  add(section("Pair",
    el("div", { class: "stack" },
      el("p", {}, el("label", { for: "pair-choice" }, "Deltas "), select),
      choice("Parts", data.parts.map((part) => part.by), redraw("by")),
      choice("Order", Object.keys(ORDERS), redraw("order"))), detail));
}

/** What compare says of pairs; many of them tend to say the same. */
function notes() {
  const list = (told) => el("ul", {}, told.map((note) => el("li", {}, note)));
  const few = data.notes.slice(0, 6), rest = data.notes.slice(6);
  const more = data.more_notes ? el("p", {}, `${format.count(data.more_notes)} notes are left out; each pair tells its own.`) : null;
  return [list(few), rest.length ? el("details", {}, el("summary", {}, `${format.count(rest.length)} more`), list(rest), more) : null];
}

summary();
matrices();
onePair();
if (data.notes.length) add(section("Notes", ...notes()));
show(chosen.pair);
