// What RUN/report.html shows: how one run went, from its own records.

const STEP = { label: "step", whole: true, min: 0 };
const curve = (key) => (data.curves[key].x.length ? data.curves[key] : null);
const some = (count, noun) => `${format.count(count)} ${noun}${count === 1 ? "" : "s"}`;

/** 75.3 s, 4:05 min, 1:02:05 h. */
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  if (seconds < 100) return `${format.number(seconds)} s`;
  const whole = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return hours ? `${hours}:${two(minutes)}:${two(rest)} h` : `${minutes}:${two(rest)} min`;
}

function valueText(value) {
  if (value === null || value === undefined) return "not set";
  if (Array.isArray(value)) return value.length ? value.join(", ") : "none";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** One figure with lines over steps; `series` are [name, {x, y}]. */
function overSteps(title, about, label, series, { marks, write = format.number, axis = {} } = {}) {
  const known = series.filter(([, one]) => one?.x.length);
  if (!known.length) return null;
  const steps = [...new Set(known.flatMap(([, one]) => one.x))].sort((a, b) => a - b);
  const values = known.map(([, one]) => new Map(one.x.map((x, i) => [x, one.y[i]])));
  const cell = (value) => (value === undefined ? "" : write(value));
  return figure({
    title, about,
    node: lines({ series: known.map(([name, one]) => ({ name, ...one })), x: STEP, y: { label, ...axis }, marks }),
    table: table(["step", ...known.map(([name]) => name)],
      steps.map((step) => [format.count(step), ...values.map((told) => cell(told.get(step)))]),
      { right: [0, ...known.map((_, i) => i + 1)], label: title }),
  });
}

const budgetMarks = () => data.marks.slice(0, -1).map((mark) => ({ x: mark.step, label: format.short(mark.entries) }));

function summary() {
  const { settings, budget, best, cost, extras, metric } = data;
  const reached = data.entries ?? 0;
  const part = budget?.base_weights ? `${format.percent(reached / budget.base_weights)} of the base's weights` : null;
  const peak = curve("peak_cuda_bytes") ?? curve("peak_resident_bytes");
  const state = data.finished ? "finished" : `at step ${format.count(data.step)}, not finished when this page was written`;
  add(el("p", { class: "path soft" }, `${data.folder} · ${state}`));
  const shown = [
    { label: "Method", value: settings.method, note: settings.adapter ? `in a ${settings.adapter} adapter` : `preset ${settings.preset}` },
    { label: "Entries", value: format.count(reached), note: budget && reached < budget.resolved ? `of a budget of ${format.count(budget.resolved)}` : part },
  ];
  if (best) shown.push({ label: best.newest ? `Newest ${metric}` : `Best ${metric}`, value: format.number(best.value), note: `at step ${format.count(best.step)}` });
  shown.push({ label: "Steps", value: format.count(data.step), note: data.max_steps ? `of ${format.count(data.max_steps)}${data.epoch ? `, ${format.number(data.epoch)} epochs` : ""}` : null });
  shown.push({ label: "Training time", value: duration(data.seconds || cost.train_seconds), note: data.sessions.length > 1 ? `in ${data.sessions.length} sessions` : null });
  if (cost.peak_bytes_above_model !== null) shown.push({ label: "Peak memory", value: format.bytes(cost.peak_bytes_above_model), note: "above the loaded model" });
  else if (peak) shown.push({ label: "Peak memory", value: format.bytes(Math.max(...peak.y)), note: "of the process" });
  if (extras?.weights) shown.push({ label: "Beside the budget", value: format.short(extras.weights), note: `weights of ${some(extras.names.length, "extra")}, trained densely` });
  add(cards(shown));
}

function remarks() {
  const { budget, sessions, extras, best } = data;
  const said = [];
  if (data.finished && budget.reached < budget.resolved) said.push(`Training ended at ${format.count(budget.reached)} of ${format.count(budget.resolved)} entries.`);
  if (data.finished && data.max_steps && data.step < data.max_steps) said.push(`Training stopped early, at step ${format.count(data.step)} of ${format.count(data.max_steps)}.`);
  const later = sessions.slice(1).map(({ step }) => format.count(step));
  if (later.length) said.push(`The run was interrupted and went on at step ${later.join(", ")}; time between sessions does not count.`);
  if (best && !best.newest && best.step < data.step) said.push(`best.sdelta is of step ${format.count(best.step)}, delta.sdelta of the end.`);
  if (extras?.weights) said.push(`Extras are trained beside the budget: ${extras.names.join(", ")}.`);
  if (data.sweep) said.push(`The learning rate was found by a sweep: ${data.sweep.reason}.`);
  if (said.length) add(section("Remarks", el("ul", {}, said.map((text) => el("li", {}, text)))));
}

function training() {
  const marks = budgetMarks();
  const about = marks.length ? " Marks are budgets that were reached." : "";
  const loss = curve("loss");
  const spread = loss && Math.min(...loss.y) > 0 && Math.max(...loss.y) > 50 * Math.min(...loss.y);
  const names = Object.keys(data.metrics).filter((name) => data.metrics[name].x.length);
  const others = names.filter((name) => name !== data.metric && name !== "loss").map((name) => [name, data.metrics[name]]);
  const figures = [
    overSteps("Loss", `The training loss, each point the mean of the steps since the one before, and the loss on the evaluation data.${about}`,
      "loss", [["training", loss], ["evaluation", data.metrics.loss]], { marks, axis: { log: spread } }),
    data.metric in data.metrics && data.metric !== "loss" ? overSteps(`Evaluation: ${data.metric}`, `${data.metric} on the evaluation data, the measure that names the best delta.${about}`,
      data.metric, [[data.metric, data.metrics[data.metric]]], { marks }) : null,
    overSteps("Other measures", "Further measures of the same evaluations.", "value", others),
    overSteps("Learning rate", "The rate of the entries.", "learning rate", [["learning rate", curve("learning_rate")]]),
    overSteps("Gradient norm", "Over the trained entries and extras, before clipping.", "norm", [["gradient norm", curve("grad_norm")]]),
  ].filter(Boolean);
  if (figures.length) add(section("Training", el("div", { class: "beside" }, figures)));
}

function budgets() {
  const { marks, metric, sweep } = data;
  const parts = [];
  if (marks.length) {
    const names = Object.keys(marks.at(-1).metrics);
    const known = marks.filter((mark) => Number.isFinite(mark.metrics[metric]));
    parts.push(table(["entries", "step", ...names, "size", "file"],
      marks.map((mark) => [format.count(mark.entries), format.count(mark.step), ...names.map((name) => format.number(mark.metrics[name])), format.bytes(mark.bytes), mark.file]),
      { right: [0, 1, ...names.map((_, i) => i + 2), names.length + 2], label: "Budget checkpoints" }));
    if (known.length > 1) {
      parts.push(figure({
        title: "Budget against metric",
        about: `${metric} on the evaluation data at each budget checkpoint and at the end.`,
        node: lines({ series: [{ name: metric, x: known.map((mark) => mark.entries), y: known.map((mark) => mark.metrics[metric]) }],
          x: { label: "entries", whole: true }, y: { label: metric } }),
      }));
    }
    add(section("Budgets", ...parts));
  }
  if (!sweep) return;
  const tried = sweep.trials.filter((trial) => trial.loss !== null);
  add(section("Learning rate sweep", figure({
    title: "Loss against learning rate",
    about: `Short trials, measured on data they were not trained on. Chosen: ${format.number(sweep.rate)}.`,
    node: lines({ series: [{ name: "loss", x: tried.map((trial) => trial.rate), y: tried.map((trial) => trial.loss) }],
      x: { label: "learning rate", log: true }, y: { label: "held-out loss" }, marks: [{ x: sweep.rate, label: "chosen" }] }),
    table: table(["rate", "loss"], sweep.trials.map((trial) => [format.number(trial.rate), trial.loss === null ? "diverged" : format.number(trial.loss)]), { right: [0, 1], label: "Rates that were tried" }),
  })));
}

function allocation() {
  const { kinds, spread, delta } = data;
  const parts = [];
  if (kinds) {
    const names = Object.keys(kinds.kinds);
    parts.push(figure({
      title: "Entries by kind over the steps",
      about: "How many of the final entries had joined by each step, by kind of tensor; those with most entries by name.",
      node: lines({ series: names.map((name) => ({ name, x: kinds.steps, y: kinds.kinds[name] })), x: STEP, y: { label: "entries", whole: true, min: 0 } }),
      table: table(["step", ...names], kinds.steps.map((step, i) => [format.count(step), ...names.map((name) => format.count(kinds.kinds[name][i]))]),
        { right: [0, ...names.map((_, i) => i + 1)], label: "Entries by step and kind" }),
    }));
    parts.push(overSteps("How widely they spread", "Tensor sparsity is the share of tensors without entries; entropy is 1 when all tensors hold equally many.",
      "share", [["tensor sparsity", { x: spread.steps, y: spread.tensor_sparsity }], ["sparsity entropy", { x: spread.steps, y: spread.sparsity_entropy }]], { axis: { min: 0, max: 1 } }));
  } else if (!data.finished) {
    parts.push(overSteps("Entries over the steps", "Entries unmasked so far.", "entries", [["entries", curve("entries")]], { write: format.count, axis: { whole: true, min: 0 } }));
  }
  if (delta?.grid.rows.length) parts.push(layerMap(delta));
  const shown = parts.filter(Boolean);
  if (shown.length) add(section("Where the entries went", ...shown));
}

function layerMap({ file, grid, entries }) {
  const { rows, columns } = grid;
  const short = columns.map((name) => name.replace(/\.weight$/, ""));
  const heads = new Set(short).size === columns.length ? short : columns;
  const measures = { Density: ["density", format.percent, "share of a cell's weights"], Entries: ["entries", format.count, "entries in a cell"] };
  const holder = el("div", {});
  const draw = (name) => {
    const [key, write, label] = measures[name];
    const values = grid[key].map((row, r) => row.map((value, c) => (grid.names[r][c].length ? value : null)));
    const known = values.flat().filter((value) => value > 0);
    const log = known.length > 0 && Math.max(...known) > 30 * Math.min(...known);
    holder.replaceChildren(heatmap({ rows, columns: heads, values, format: write, label: `${name} by block and kind of tensor`, scale: log ? { label, log } : { label, min: 0 } }));
  };
  draw("Density");
  return figure({
    title: "By block and kind",
    about: `Each cell holds the tensors of one kind in one block of layers: the ${format.count(entries)} entries of ${file}.`,
    node: el("div", {}, choice("Colour", Object.keys(measures), draw), holder),
  });
}

function costs() {
  const memory = [["in use", "resident_bytes"], ["peak", "peak_resident_bytes"], ["GPU, in use", "cuda_bytes"], ["GPU, peak", "peak_cuda_bytes"]];
  const figures = [
    overSteps("Throughput", "Examples per second of training; evaluating and saving stand outside.", "examples per second",
      [["examples per second", curve("examples_per_second")]], { axis: { min: 0 } }),
    overSteps("Tokens", "Tokens per second of training, padding left out.", "tokens per second",
      [["tokens per second", curve("tokens_per_second")]], { axis: { min: 0 } }),
    overSteps("Memory", "Of the whole process, and of torch on the GPU where there is one.", "bytes",
      memory.map(([name, key]) => [name, curve(key)]), { write: format.bytes, axis: { min: 0, write: format.bytes } }),
  ].filter(Boolean);
  if (figures.length) add(section("What it cost", el("div", { class: "beside" }, figures)));
}

function records() {
  const { settings, start, delta, sessions } = data;
  const { base, environment, splits } = start;
  const own = Object.entries(settings).filter(([, value]) => value !== null && !(Array.isArray(value) && !value.length));
  const rest = Object.keys(settings).filter((name) => !own.some(([known]) => known === name));
  // Long names may break after an underscore, and nowhere else.
  const broken = (name) => el("span", {}, ...name.split(/(?<=_)/).flatMap((part) => [part, el("wbr", {})]));
  add(section("Settings", facts(own.map(([name, value]) => [broken(name), valueText(value)])),
    rest.length ? el("p", { class: "soft" }, `Not set: ${rest.join(", ")}.`) : null));
  if (base) {
    add(section("Base", facts([["Model", settings.model], ["Recorded as", base.model_id ?? "no id: a local folder"], ["Revision", base.revision ?? "not recorded"],
      ["Weights", format.count(base.total_weights)], ...(delta ? [["Fingerprints", `of ${some(delta.fingerprints, "tensor")}, in ${delta.file}`]] : [])])));
  }
  if (splits) add(section("Data", facts(Object.entries(splits).map(([name, value]) => [name.replaceAll("_", " "), valueText(value)]))));
  if (!environment) return;
  const { versions, memory_bytes: memory, ...machine } = environment;
  add(section("Environment", facts([
    ...Object.entries(machine).map(([name, value]) => [name, value === null ? "none" : valueText(value)]),
    ["memory", format.bytes(memory)], ...Object.entries(versions),
    ...sessions.map(({ step, began }) => [step ? `went on at step ${format.count(step)}` : "began", began]),
  ])));
}

summary();
remarks();
training();
budgets();
allocation();
costs();
records();
