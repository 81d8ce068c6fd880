// What `deltakit inspect --html` shows of a delta.

const TENSORS = data.tensors.name.length;
const TABLE_ROWS = 200; // of the table of tensors at a time
const MAP_CELLS = 20000; // of a heat-map that browsers draw at once

function summary() {
  const { provenance: told, base, run, adapter } = data;
  const whole = adapter ? "adapter" : "touched tensors";
  const modes = [...new Set(data.tensors.mode)].join(" and ");
  const found = [{ label: "Entries", value: format.count(data.entries), note: `in ${plural(TENSORS, "tensor")}${modes && `, mode ${modes}`}` }];
  found.push(data.density_of_base === null
    ? { label: "Density", value: format.percent(data.density_of_touched), note: `of the ${whole}; the size of the base is not recorded` }
    : { label: "Density", value: format.percent(data.density_of_base), note: `of the base; ${format.percent(data.density_of_touched)} of the ${whole}` });
  found.push({ label: "File", value: format.bytes(data.bytes.file), note: data.entries ? `${bitsPerEntry(data.bytes.file)} bits per entry` : null });
  if (data.entries) {
    found.push({ label: "Bits per index", value: data.bits_per_index.toFixed(2), note: `entropy of the supports ${data.entropy_bits_per_index.toFixed(2)}` });
  }
  if (told.method) found.push({ label: "Method", value: told.method, note: told.lr ? `rate ${told.lr}${told.task ? `, ${told.task}` : ""}` : told.task });
  found.push(base === null
    ? { label: "Base", value: "not recorded" }
    : { label: "Base", value: base.model_id ?? "no id recorded", note: base.total_weights === null ? null : `${format.short(base.total_weights)} weights` });
  if (adapter) found.push({ label: "Adapter", value: adapter.kind, note: `at ${plural(adapter.modules.length, "module")}, ${format.short(adapter.weights)} weights` });
  if (data.extras.length) found.push({ label: "Extras", value: format.short(data.extra_weights), note: `weights in ${plural(data.extras.length, "tensor")}, kept whole` });
  if (run && run.at !== null && run.values[run.at] !== null) {
    found.push({ label: run.metric, value: format.number(run.values[run.at]), note: `at step ${format.count(run.steps[run.at])}` });
  }
  add(el("p", { class: "path soft" }, `${data.path} · .sdelta version ${data.format_version}`), cards(found));
  if (data.remote) {
    add(el("p", { class: "notice" }, "Only the header of this file was read, as it is on the Hub: how large the changes are, where in the tensors they stand and when they joined is not known here. Pull the delta to see them."));
  }
}

function bitsPerEntry(size) {
  return ((8 * size) / data.entries).toFixed(2);
}

const MEASURES = {
  density: { name: "Density", at: 3, write: format.percent, label: "share of a cell's weights" },
  change: { name: "Mean |change|", at: 4, write: format.number, label: "mean |change| of a cell's entries" },
  entries: { name: "Entries", at: 2, write: format.count, label: "entries in a cell" },
};

function places() {
  const { rows, columns, cells } = data.grid;
  if (!cells.length) {
    add(section("Where the entries are", el("p", {}, "This delta holds no tensor with entries.")));
    return;
  }
  const detail = el("div", { class: "detail", "aria-live": "polite" });
  const parts = [tensorTable((index) => showTensors(detail, [index]))];
  if (rows.length * columns.length <= MAP_CELLS) parts.unshift(layerMap(detail));
  add(section("Where the entries are", ...parts.slice(0, -1), detail, parts.at(-1)));
}

function layerMap(detail) {
  const { rows, columns, cells } = data.grid;
  const held = rows.map(() => columns.map(() => null));
  cells.forEach((cell) => { held[cell[0]][cell[1]] = cell; });
  const short = columns.map((name) => name.replace(/\.weight$/, ""));
  const names = new Set(short).size === columns.length ? short : columns;
  const holder = el("div", {});
  const draw = ({ name, at, write, label }) => {
    const known = cells.map((cell) => cell[at]).filter((value) => value > 0);
    const log = known.length > 0 && Math.max(...known) > 30 * Math.min(...known);
    holder.replaceChildren(heatmap({
      rows, columns: names, format: write, label: `${name} by block and kind of tensor`,
      values: held.map((row) => row.map((cell) => cell && cell[at])),
      scale: log ? { label, log } : { label, min: 0 },
      pick: (r, c) => showTensors(detail, held[r][c][5], holder),
      holds: (r, c) => held[r][c] !== null,
    }));
  };
  const measures = Object.values(MEASURES).filter(({ at }) => cells.some((cell) => cell[at] !== null));
  const switcher = choice("Colour", measures.map(({ name }) => name), (name) => draw(measures.find((one) => one.name === name)));
  draw(measures[0]);
  return figure({
    title: "By block and kind",
    about: "Each cell holds the tensors of one kind in one block of layers. Pick a cell, by pointer or by arrow keys and Enter, to see its tensors.",
    node: el("div", {}, switcher, holder),
  });
}

function tensorTable(show) {
  const heads = ["tensor", "shape", "mode", "entries", "density", "bits per index", "mean |change|"];
  const holder = el("div", {}), count = el("p", { class: "soft", role: "status" });
  const row = (index) => {
    const one = tensorAt(index);
    return [el("button", { type: "button", class: "link", onclick: () => show(index) }, one.name), shape(one.shape), one.mode,
      format.count(one.entries), format.percent(one.density), format.number(one.bits_per_index), meanChange(one)];
  };
  const draw = (words) => {
    const found = data.tensors.name.map((_, i) => i).filter((i) => words.every((word) => data.tensors.name[i].toLowerCase().includes(word)));
    const shown = found.slice(0, TABLE_ROWS);
    count.textContent = `${plural(found.length, "tensor")}${shown.length < found.length ? `, of which the first ${TABLE_ROWS} are listed` : ""}.`;
    holder.replaceChildren(table(heads, shown.map(row), { right: [3, 4, 5, 6], label: "Tensors" }));
  };
  const search = el("input", { type: "search", oninput: () => draw(search.value.toLowerCase().split(/\s+/)) });
  const filter = el("p", { class: "filter" }, el("label", {}, "Names with ", search));
  draw([]);
  return folded(`All ${plural(TENSORS, "tensor")}`, ...(TENSORS > 20 ? [filter] : []), count, holder);
}

function meanChange({ changes, entries }) {
  if (!entries) return "";
  if (changes === null || !changes.known) return "unknown";
  return format.number(changes.mean);
}

function changes() {
  if (data.histogram === null || !data.entries) return;
  const { changes: told } = data;
  const line = told.known ? [el("p", {}, `|change| is ${format.number(told.mean)} on average, ${format.number(told.least)} at least and ${format.number(told.most)} at most.`)] : [];
  add(section("How large the changes are", ...line, ...changeFigure(data.histogram, "All changes")));
}

function training() {
  const parts = [];
  if (data.unmasking) {
    const { steps, kinds } = data.unmasking;
    const names = Object.keys(kinds), short = withoutCommon(names);
    parts.push(figure({
      title: "Entries over the steps of training",
      about: "How many of the entries in this delta had joined by each step, by kind of tensor.",
      node: lines({ series: names.map((name, i) => ({ name: short[i], x: steps, y: kinds[name] })), x: { label: "step", whole: true }, y: { label: "entries", whole: true, min: 0 }, step: true }),
      table: table(["step", ...names], steps.map((step, i) => [format.count(step), ...names.map((name) => format.count(kinds[name][i]))]), { right: [0, ...names.map((_, i) => i + 1)], label: "Entries by step and kind" }),
    }));
  } else if (!data.remote && data.entries) {
    const { first_step: step } = data.changes;
    parts.push(el("p", { class: "soft" }, step === null ? "This delta does not record when its entries joined." : `All entries joined at step ${format.count(step)}.`));
  }
  if (data.run && data.run.entries.length > 1) parts.push(runFigure(data.run));
  if (parts.length) add(section("Over training", ...parts));
}

/** Names without the parts with which all of them that have several parts begin. */
function withoutCommon(names) {
  const parts = names.filter((name) => name.includes(".")).map((name) => name.split("."));
  let common = 0;
  while (parts.length > 1 && parts.every((each) => each.length > common + 1 && each[common] === parts[0][common])) common += 1;
  return names.map((name) => (name.includes(".") ? name.split(".").slice(common).join(".") : name));
}

function runFigure({ metric, entries, steps, values, files, at }) {
  const order = entries.map((_, i) => i).sort((a, b) => entries[a] - entries[b]);
  const mark = at === null ? [] : [{ x: entries[at], label: "this delta" }];
  return figure({
    title: "Budget against metric",
    about: `What the run measured at each of its budgets: ${metric} on its evaluation data.`,
    node: lines({ series: [{ name: metric, x: order.map((i) => entries[i]), y: order.map((i) => values[i]) }], x: { label: "entries", log: entries.every((n) => n > 0) }, y: { label: metric }, marks: mark }),
    table: table(["file", "step", "entries", metric], order.map((i) => [files[i], format.count(steps[i]), format.count(entries[i]), format.number(values[i])]), { right: [1, 2, 3] }),
  });
}

summary();
places();
changes();
training();
costs();
records();
