// What `deltakit sweep` shows: the metric over eps and exp.

const { metric, points } = data;
const distinct = (key) => [...new Set(points.map((point) => point[key]))].sort((a, b) => a - b);
const [allEps, allExp] = [distinct("eps"), distinct("exp")];
const at = (eps, exp) => points.find((point) => point.eps === eps && point.exp === exp);
const known = points.filter((point) => point.value !== null);
const written = (x) => (x === null || x === undefined ? "failed" : x.toFixed(4));

function summary() {
  const best = known.length ? known.reduce((a, b) => (b.value > a.value ? b : a)) : null;
  add(cards([
    { label: "Method", value: data.method, note: data.task },
    { label: "Budget", value: String(data.budget), note: "entries" },
    { label: "Runs", value: format.count(points.length), note: known.length < points.length ? `${points.length - known.length} failed` : null },
    ...(best ? [{ label: `Highest ${metric}`, value: written(best.value), note: `eps ${best.eps}, exp ${best.exp}` }] : []),
  ]));
}

function results() {
  if (known.length) {
    add(section("Results",
      figure({
        title: `${metric} by eps and exp`,
        about: "One run per cell; empty cells failed.",
        node: heatmap({ rows: allExp.map((x) => `exp ${x}`), columns: allEps.map((x) => `eps ${x}`), format: written, empty: "failed",
          values: allExp.map((exp) => allEps.map((eps) => at(eps, exp)?.value ?? null)), label: `${metric} by exp and eps`, scale: { label: metric } }),
      }),
      figure({
        title: `${metric} against exp`,
        about: "One line per eps.",
        node: lines({ series: allEps.map((eps) => ({ name: `eps ${eps}`, x: allExp, y: allExp.map((exp) => at(eps, exp)?.value ?? null) })),
          x: { label: "exp" }, y: { label: metric } }),
      })));
  }
  add(section("Every run", table(["eps", "exp", metric ?? "metric", "tensor sparsity", "sparsity entropy", "remark"],
    points.map((point) => [String(point.eps), String(point.exp), written(point.value),
      point.error ? "" : format.number(point.tensor_sparsity), point.error ? "" : format.number(point.sparsity_entropy), point.error ?? ""]), { right: [0, 1, 2, 3, 4], label: "Runs" })));
}

summary();
results();
