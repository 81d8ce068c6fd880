// What `deltakit train --compare` shows: methods at equal budget, every seed and their mean.

const { metric, methods } = data;
const shown = methods.filter((row) => row.mean !== null);
const valueOf = (x) => (x === null || x === undefined ? "" : x.toFixed(4));
const spreadOf = (row) => `${valueOf(row.mean)}${row.deviation === null ? "" : ` ± ${valueOf(row.deviation)}`}`;
const maybe = (write) => (x) => (x === null || x === undefined ? "" : write(x));

function summary() {
  add(cards([
    { label: "Methods", value: format.count(methods.length), note: `${data.seeds.length} ${data.seeds.length === 1 ? "seed" : "seeds"} each` },
    { label: "Budget", value: String(data.budget), note: "entries, the same for all" },
    { label: "Model", value: data.model },
    { label: "Data", value: data.data, note: data.task },
  ]));
}

/** One row per method: a dot per seed, and the mean with its standard deviation to both sides. */
function dots() {
  const last = shown.length - 1;
  const known = shown.flatMap((row) => [...row.runs.map((run) => run.value), row.mean - (row.deviation ?? 0), row.mean + (row.deviation ?? 0)]);
  const [from, to] = tight(known.filter(Number.isFinite), {});
  const margin = (to - from) * 0.04;
  const draw = (width) => {
    const height = 38 * (shown.length + 1) + 76;
    const box = frame(width, height, { label: metric, from: from - margin, to: to + margin },
      { label: "", whole: true, from: -0.5, to: last + 0.5, write: (i) => shown[last - i]?.method ?? "" });
    const stops = shown.map((row, i) => {
      const y = box.toY(last - i), x = box.toX(row.mean), out = row.deviation ?? 0;
      box.root.append(svg("g", { class: "series s0" },
        svg("line", { class: "line", x1: box.toX(row.mean - out), x2: box.toX(row.mean + out), y1: y, y2: y }),
        MARKERS[3](x, y)));
      box.root.append(svg("g", { class: "series s1" }, row.runs.filter((run) => Number.isFinite(run.value)).map((run) => MARKERS[0](box.toX(run.value), y + 9))));
      const seeds = row.runs.map((run) => (run.error ? `seed ${run.seed} failed` : `seed ${run.seed} ${valueOf(run.value)}`));
      return { x, y, text: `${row.method}: ${spreadOf(row)} · ${seeds.join(" · ")}`,
        guide: () => svg("line", { class: "guide", x1: box.left, x2: box.right, y1: y, y2: y }) };
    });
    return { frame: box, stops, stride: 1 };
  };
  const names = ["mean ± standard deviation", "one seed"];
  const swatch = (i) => svg("g", { class: `series s${i}` }, i ? null : svg("line", { class: "line", x1: 0, x2: 28, y1: 6, y2: 6 }), MARKERS[i ? 0 : 3](14, 6));
  return el("div", {}, legend(names, swatch), plot(`${metric} by method: ${shown.map((row) => `${row.method} ${spreadOf(row)}`).join(", ")}.`, draw));
}

function results() {
  const heads = ["method", "trained", metric ?? "metric", "train seconds", "peak memory", "file"];
  const rows = methods.map((row) => [row.method, maybe(format.count)(row.trained), row.mean === null ? "failed" : spreadOf(row),
    maybe(format.number)(row.train_seconds), maybe(format.bytes)(row.peak_bytes_above_model), maybe(format.bytes)(row.bytes)]);
  const chart = shown.length ? [figure({ title: `${metric} by method`, about: "Every run on the same data, with the same budget and the same seeds.", node: dots() })] : [];
  add(section("Results", ...chart, table(heads, rows, { right: [1, 2, 3, 4, 5], label: "Methods" })));
}

function runs() {
  const rows = methods.flatMap((row) => row.runs.map((run) => [row.method, String(run.seed), run.error ? "failed" : valueOf(run.value),
    maybe(format.number)(run.train_seconds), maybe(format.bytes)(run.peak_bytes_above_model), run.error ?? ""]));
  add(section("Every run", el("p", { class: "soft" }, "Each has a folder of its own, METHOD/seed-N, in which all but those of peers left a report. Costs of resumed runs are not known."),
    table(["method", "seed", metric ?? "metric", "train seconds", "peak memory", "remark"], rows, { right: [1, 2, 3, 4], label: "Runs" })));
}

summary();
results();
runs();
