// One tensor of a delta: what is known of it, where its entries are, how large their changes.

const TENSORS = data.tensors.name.length;

/** Everything that is known of the tensor at a position. */
function tensorAt(index) {
  return Object.fromEntries(Object.entries(data.tensors).map(([fact, all]) => [fact, all[index]]));
}

function plural(count, noun) {
  return `${format.count(count)} ${noun}${count === 1 ? "" : "s"}`;
}

function shape(sides) {
  return sides.length ? sides.map(format.count).join("\u00a0×\u00a0") : "scalar";
}

function valueText(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** Show the tensors at some positions, one at a time, and bring the first into view. */
function showTensors(detail, indices, from) {
  const heading = el("h3", { tabindex: -1 }),
    body = el("div", {});
  const draw = (index) => {
    heading.textContent = visible(data.tensors.name[index]);
    body.replaceChildren(...tensorParts(tensorAt(index)));
  };
  const close = () => {
    detail.replaceChildren();
    from?.querySelector("[aria-selected=true]")?.focus();
  };
  const select = el(
    "select",
    { onchange: () => draw(Number(select.value)) },
    indices.map((index) => el("option", { value: index }, data.tensors.name[index])),
  );
  detail.replaceChildren(
    el("div", { class: "bar" }, heading, el("button", { type: "button", onclick: close }, "Close")),
    ...(indices.length > 1
      ? [el("p", { class: "filter" }, el("label", {}, `One of ${indices.length} tensors `, select))]
      : []),
    body,
  );
  detail.onkeydown = (event) => {
    if (event.key === "Escape") close();
  };
  draw(indices[0]);
  heading.focus({ preventScroll: true });
  detail.scrollIntoView({ block: "nearest" });
}

function tensorParts(one) {
  const numbers = facts(tensorFacts(one));
  if (!one.occupancy) return [numbers];
  const places = figure({
    title: "Where in the tensor",
    about: occupancyText(one),
    node: occupancyChart(one),
    table: occupancyTable(one.occupancy),
  });
  const sizes = changeFigure(one.histogram, "Size of its changes");
  const tall = one.occupancy.rows.length > 1; // the map is: the rest stands beside it
  return [tall ? beside(places, [numbers, ...sizes]) : beside([places, ...sizes], numbers)];
}

function tensorFacts(one) {
  const { changes } = one;
  const coded = one.seed === null ? one.coding : `${one.coding}, rebuilt from seed ${one.seed}`;
  const pairs = [
    ["Shape", shape(one.shape)],
    [
      "Dtype",
      one.dtype === one.trained_dtype ? one.dtype : `${one.dtype}, trained as ${one.trained_dtype}`,
    ],
    ["Entries", `${format.count(one.entries)}, ${format.percent(one.density)} of the tensor`],
    ["Mode", one.mode === "set" ? "set: entries become the value" : "add: values are added"],
    ["Values stored as", one.value_dtype],
    ["Coding of places", coded],
    [
      "Bits per index",
      `${one.bits_per_index.toFixed(2)}; entropy ${one.entropy_bits_per_index.toFixed(2)}`,
    ],
    ["Size", format.bytes(one.bytes)],
  ];
  if (changes?.known)
    pairs.push([
      "|change|",
      `${format.number(changes.least)} to ${format.number(changes.most)}, mean ${format.number(changes.mean)}`,
    ]);
  if (changes && changes.first_step !== null)
    pairs.push([
      "Joined",
      `at steps ${format.count(changes.first_step)} to ${format.count(changes.last_step)}`,
    ]);
  return pairs;
}

function sides({
  shape: [height, width],
  rows,
  columns,
  rows_per_bin: tall,
  columns_per_bin: wide,
}) {
  return {
    rows: { label: "row", size: height, perBin: tall, sums: rows },
    columns: {
      label: height > 1 ? "column" : "position",
      size: width,
      perBin: wide,
      sums: columns,
    },
  };
}

function occupancyText({ shape: own, occupancy }) {
  const { rows, columns } = sides(occupancy);
  const each = (side) =>
    side.perBin > 1 ? `${plural(side.perBin, side.label)} each` : `one ${side.label} each`;
  if (rows.size === 1) return `Entries over positions, ${each(columns)}.`;
  const flat =
    own.length > 2
      ? ` Dimension 1 of ${own.length} makes the rows, the others together the columns.`
      : "";
  return `Cells of ${plural(rows.perBin, "row")} by ${plural(columns.perBin, "column")}.${flat}`;
}

function occupancyChart({ occupancy, entries }) {
  if (!entries) return el("p", { class: "soft" }, "It holds no entry.");
  const { rows, columns } = sides(occupancy);
  if (rows.size * columns.size === 1) return el("p", { class: "soft" }, "It has one element.");
  if (rows.size > 1) return joint({ cells: occupancy.cells, rows, columns });
  const edges = columns.sums.map((_, bin) => bin * columns.perBin);
  return bars({
    edges: [...edges, columns.size],
    series: [{ name: "entries", counts: columns.sums }],
    x: { label: columns.label, write: format.count, whole: true },
    y: { label: "entries" },
  });
}

function occupancyTable(occupancy) {
  const rows = Object.values(sides(occupancy))
    .filter(({ size }) => size > 1)
    .flatMap((side) => side.sums.map((sum, bin) => [binText(side, bin), format.count(sum)]));
  return table(["part of the tensor", "entries"], rows, { right: [1] });
}

function changeFigure(histogram, title) {
  const { edges, positive, negative } = histogram;
  const [first, last] = mostOf(positive.map((count, bin) => count + negative[bin]));
  const notes = changeNotes(histogram, first, last);
  if (!positive.length) return notes.length ? [el("p", { class: "soft" }, notes.join(" "))] : [];
  return [
    figure({
      title,
      about: [
        "Entries by |change|: those that grew stand above the line, those that shrank below it.",
        ...notes,
      ].join(" "),
      node: bars({
        edges: edges.slice(first, last + 1),
        mirror: true,
        x: { label: "|change|", log: true },
        y: { label: "entries" },
        series: [
          { name: "increased", counts: positive.slice(first, last) },
          { name: "decreased", counts: negative.slice(first, last) },
        ],
      }),
      table: table(
        ["|change| from", "to", "increased", "decreased"],
        positive.map((count, bin) => [
          format.number(edges[bin]),
          format.number(edges[bin + 1]),
          format.count(count),
          format.count(negative[bin]),
        ]),
        { right: [0, 1, 2, 3] },
      ),
    }),
  ];
}

/** The bins [first, last) that remain when either end drops up to a thousandth of all. */
function mostOf(counts) {
  const spared = counts.reduce((a, b) => a + b, 0) / 1000;
  let first = 0,
    last = counts.length;
  for (let left = spared - counts[0]; left >= 0; left -= counts[first]) first += 1;
  for (let left = spared - counts[last - 1]; left >= 0; left -= counts[last - 1]) last -= 1;
  return [first, last];
}

function changeNotes({ edges, positive, zeros, unknown: untold, non_finite: wild }, first, last) {
  const notes = [];
  if (last - first < positive.length)
    notes.push(
      `Up to a thousandth of them at either end, down to ${format.number(edges[0])} and up to ${format.number(edges.at(-1))}, are in the table only.`,
    );
  if (zeros) notes.push(`${plural(zeros, "entry").replace("entrys", "entries")} changed nothing.`);
  if (untold)
    notes.push(
      `Of ${format.count(untold)} the change is not known: they are in set mode without the base's values.`,
    );
  if (wild) notes.push(`${format.count(wild)} went to or from infinities or NaN.`);
  return notes;
}
