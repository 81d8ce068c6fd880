// Where the entries of a delta are: a map of its layers, and a table of its tensors.

const TABLE_ROWS = 200; // of the table of tensors at a time
const MAP_CELLS = 20000; // of a heat-map that browsers draw at once

const MEASURES = {
  density: { name: "Density", at: 3, write: format.percent, label: "share of a cell's weights" },
  change: {
    name: "Mean |change|",
    at: 4,
    write: format.number,
    label: "mean |change| of a cell's entries",
  },
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
  cells.forEach((cell) => {
    held[cell[0]][cell[1]] = cell;
  });
  const short = columns.map((name) => name.replace(/\.weight$/, ""));
  const names = new Set(short).size === columns.length ? short : columns;
  const holder = el("div", {});
  const draw = ({ name, at, write, label }) => {
    const known = cells.map((cell) => cell[at]).filter((value) => value > 0);
    const log = known.length > 0 && Math.max(...known) > 30 * Math.min(...known);
    holder.replaceChildren(
      heatmap({
        rows,
        columns: names,
        format: write,
        label: `${name} by block and kind of tensor`,
        values: held.map((row) => row.map((cell) => cell && cell[at])),
        scale: log ? { label, log } : { label, min: 0 },
        pick: (r, c) => showTensors(detail, held[r][c][5], holder),
        holds: (r, c) => held[r][c] !== null,
      }),
    );
  };
  const measures = Object.values(MEASURES).filter(({ at }) =>
    cells.some((cell) => cell[at] !== null),
  );
  const switcher = choice(
    "Colour",
    measures.map(({ name }) => name),
    (name) => draw(measures.find((one) => one.name === name)),
  );
  draw(measures[0]);
  return figure({
    title: "By block and kind",
    about:
      "Each cell holds the tensors of one kind in one block of layers. Pick a cell, by pointer or by arrow keys and Enter, to see its tensors.",
    node: el("div", {}, switcher, holder),
  });
}

function tensorTable(show) {
  const heads = [
    "tensor",
    "shape",
    "mode",
    "entries",
    "density",
    "bits per index",
    "mean |change|",
  ];
  const holder = el("div", {}),
    count = el("p", { class: "soft", role: "status" });
  const row = (index) => {
    const one = tensorAt(index);
    return [
      el("button", { type: "button", class: "link", onclick: () => show(index) }, one.name),
      shape(one.shape),
      one.mode,
      format.count(one.entries),
      format.percent(one.density),
      format.number(one.bits_per_index),
      meanChange(one),
    ];
  };
  const draw = (words) => {
    const found = data.tensors.name
      .map((_, i) => i)
      .filter((i) => words.every((word) => data.tensors.name[i].toLowerCase().includes(word)));
    const shown = found.slice(0, TABLE_ROWS);
    count.textContent = `${plural(found.length, "tensor")}${shown.length < found.length ? `, of which the first ${TABLE_ROWS} are listed` : ""}.`;
    holder.replaceChildren(table(heads, shown.map(row), { right: [3, 4, 5, 6], label: "Tensors" }));
  };
  const search = el("input", {
    type: "search",
    oninput: () => draw(search.value.toLowerCase().split(/\s+/)),
  });
  const filter = el("p", { class: "filter" }, el("label", {}, "Names with ", search));
  draw([]);
  return folded(
    `All ${plural(TENSORS, "tensor")}`,
    ...(TENSORS > 20 ? [filter] : []),
    count,
    holder,
  );
}

function meanChange({ changes, entries }) {
  if (!entries) return "";
  if (changes === null || !changes.known) return "unknown";
  return format.number(changes.mean);
}
