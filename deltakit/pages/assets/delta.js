// What `deltakit inspect --html` shows of a delta.

function summary() {
  const { provenance: told, base, run, adapter } = data;
  const whole = adapter ? "adapter" : "touched tensors";
  const modes = [...new Set(data.tensors.mode)].join(" and ");
  const found = [
    {
      label: "Entries",
      value: format.count(data.entries),
      note: `in ${plural(TENSORS, "tensor")}${modes && `, mode ${modes}`}`,
    },
  ];
  found.push(
    data.density_of_base === null
      ? {
          label: "Density",
          value: format.percent(data.density_of_touched),
          note: `of the ${whole}; the size of the base is not recorded`,
        }
      : {
          label: "Density",
          value: format.percent(data.density_of_base),
          note: `of the base; ${format.percent(data.density_of_touched)} of the ${whole}`,
        },
  );
  found.push({
    label: "File",
    value: format.bytes(data.bytes.file),
    note: data.entries ? `${bitsPerEntry(data.bytes.file)} bits per entry` : null,
  });
  if (data.entries) {
    found.push({
      label: "Bits per index",
      value: data.bits_per_index.toFixed(2),
      note: `entropy of the supports ${data.entropy_bits_per_index.toFixed(2)}`,
    });
  }
  if (told.method)
    found.push({
      label: "Method",
      value: told.method,
      note: told.lr ? `rate ${told.lr}${told.task ? `, ${told.task}` : ""}` : told.task,
    });
  found.push(
    base === null
      ? { label: "Base", value: "not recorded" }
      : {
          label: "Base",
          value: base.model_id ?? "no id recorded",
          note: base.total_weights === null ? null : `${format.short(base.total_weights)} weights`,
        },
  );
  if (adapter)
    found.push({
      label: "Adapter",
      value: adapter.kind,
      note: `at ${plural(adapter.modules.length, "module")}, ${format.short(adapter.weights)} weights`,
    });
  if (data.extras.length)
    found.push({
      label: "Extras",
      value: format.short(data.extra_weights),
      note: `weights in ${plural(data.extras.length, "tensor")}, kept whole`,
    });
  if (run && run.at !== null && run.values[run.at] !== null) {
    found.push({
      label: run.metric,
      value: format.number(run.values[run.at]),
      note: `at step ${format.count(run.steps[run.at])}`,
    });
  }
  add(
    el("p", { class: "path soft" }, `${data.path} · .sdelta version ${data.format_version}`),
    cards(found),
  );
  if (data.remote) {
    add(
      el(
        "p",
        { class: "notice" },
        "Only the header of this file was read, as it is on the Hub: how large the changes are, where in the tensors they stand and when they joined is not known here. Pull the delta to see them.",
      ),
    );
  }
}

function bitsPerEntry(size) {
  return ((8 * size) / data.entries).toFixed(2);
}

function changes() {
  if (data.histogram === null || !data.entries) return;
  const { changes: told } = data;
  const line = told.known
    ? [
        el(
          "p",
          {},
          `|change| is ${format.number(told.mean)} on average, ${format.number(told.least)} at least and ${format.number(told.most)} at most.`,
        ),
      ]
    : [];
  add(
    section("How large the changes are", ...line, ...changeFigure(data.histogram, "All changes")),
  );
}

function training() {
  const parts = [];
  if (data.unmasking) {
    const { steps, kinds } = data.unmasking;
    const names = Object.keys(kinds),
      short = withoutCommon(names);
    parts.push(
      figure({
        title: "Entries over the steps of training",
        about: "How many of the entries in this delta had joined by each step, by kind of tensor.",
        node: lines({
          series: names.map((name, i) => ({ name: short[i], x: steps, y: kinds[name] })),
          x: { label: "step", whole: true },
          y: { label: "entries", whole: true, min: 0 },
          step: true,
        }),
        table: table(
          ["step", ...names],
          steps.map((step, i) => [
            format.count(step),
            ...names.map((name) => format.count(kinds[name][i])),
          ]),
          { right: [0, ...names.map((_, i) => i + 1)], label: "Entries by step and kind" },
        ),
      }),
    );
  } else if (!data.remote && data.entries) {
    const { first_step: step } = data.changes;
    parts.push(
      el(
        "p",
        { class: "soft" },
        step === null
          ? "This delta does not record when its entries joined."
          : `All entries joined at step ${format.count(step)}.`,
      ),
    );
  }
  if (data.run && data.run.entries.length > 1) parts.push(runFigure(data.run));
  if (parts.length) add(section("Over training", ...parts));
}

/** Names without the parts with which all of them that have several parts begin. */
function withoutCommon(names) {
  const parts = names.filter((name) => name.includes(".")).map((name) => name.split("."));
  let common = 0;
  while (
    parts.length > 1 &&
    parts.every((each) => each.length > common + 1 && each[common] === parts[0][common])
  )
    common += 1;
  return names.map((name) => (name.includes(".") ? name.split(".").slice(common).join(".") : name));
}

function runFigure({ metric, entries, steps, values, files, at }) {
  const order = entries.map((_, i) => i).sort((a, b) => entries[a] - entries[b]);
  const mark = at === null ? [] : [{ x: entries[at], label: "this delta" }];
  return figure({
    title: "Budget against metric",
    about: `What the run measured at each of its budgets: ${metric} on its evaluation data.`,
    node: lines({
      series: [{ name: metric, x: order.map((i) => entries[i]), y: order.map((i) => values[i]) }],
      x: { label: "entries", log: entries.every((n) => n > 0) },
      y: { label: metric },
      marks: mark,
    }),
    table: table(
      ["file", "step", "entries", metric],
      order.map((i) => [
        files[i],
        format.count(steps[i]),
        format.count(entries[i]),
        format.number(values[i]),
      ]),
      { right: [1, 2, 3] },
    ),
  });
}

summary();
places();
changes();
training();
costs();
records();
