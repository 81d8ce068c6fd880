// What a delta says of itself: its size by part, its adapter, extras, base and provenance.

const PARTS = {
  header: "Header",
  indices: "Places (indices)",
  values: "Values",
  order: "Order of joining",
  base_values: "Base values",
  extras: "Extras",
};

function costs() {
  const { bytes: sizes } = data;
  const parts = Object.entries(PARTS).filter(([part]) => sizes[part]);
  const perEntry = (size) => (data.entries ? bitsPerEntry(size) : "");
  const row = (name, size, remark) => [name, format.bytes(size), perEntry(size), remark];
  const rows = parts.map(([part, name]) => row(name, sizes[part], meter(sizes[part] / sizes.file)));
  rows.push(row("File", sizes.file, ""));
  if (data.entries) {
    const over =
      sizes.support_entropy >= 1
        ? `places take ${(sizes.indices / sizes.support_entropy).toFixed(3)} times this`
        : "";
    rows.push(row("Entropy of the supports", sizes.support_entropy, over));
    const bare = sizes.file - sizes.extras;
    rows.push(
      row(
        "Raw coordinates, int64 and float32",
        sizes.raw_coo,
        `${(sizes.raw_coo / bare).toFixed(2)} times the file${sizes.extras ? " without extras" : ""}`,
      ),
    );
  }
  add(
    section(
      "What it costs",
      table(["part", "size", "bits per entry", "share of the file"], rows, {
        right: [1, 2],
        label: "Size of the file by part",
      }),
    ),
  );
}

function meter(share) {
  const bar = el("span", { class: "meter", "aria-hidden": "true" }, el("span", {}));
  bar.firstChild.style.width = `${100 * share}%`;
  return el("span", { class: "metered" }, bar, format.percent(share));
}

function records() {
  const { adapter, extras, config, provenance } = data;
  const texts = (told) =>
    facts(Object.entries(told).map(([name, value]) => [name, valueText(value)]));
  add(
    section(
      "What is recorded",
      ...(adapter ? adapterParts(adapter) : []),
      beside(
        [el("h3", {}, "Base"), baseFacts(data.base)],
        ...(extras.length ? [extraParts(extras)] : []),
      ),
      ...(Object.keys(config).length
        ? [el("h3", {}, "Changes of configuration"), texts(config)]
        : []),
      el("h3", {}, "Provenance"),
      Object.keys(provenance).length
        ? texts(provenance)
        : el("p", { class: "soft" }, "How this delta was made is not recorded."),
    ),
  );
}

function baseFacts(base) {
  if (base === null)
    return el("p", { class: "soft" }, "Which base this delta belongs to is not recorded.");
  return facts([
    ["Model", base.model_id ?? "no id recorded"],
    ["Revision", base.revision ?? "not recorded"],
    ["Weights", base.total_weights === null ? "not recorded" : format.count(base.total_weights)],
    ["Fingerprints", `of ${plural(base.tensors, "tensor")}`],
  ]);
}

function extraParts(extras) {
  const rows = extras.map((one) => [one.name, shape(one.shape), one.dtype]);
  return [
    el("h3", {}, "Extras"),
    el("p", { class: "soft" }, "Whole tensors, stored beside the entries and outside the budget."),
    table(["tensor", "shape", "dtype"], rows),
  ];
}

function adapterParts(adapter) {
  const initial = Object.entries(adapter.initial)
    .map(([name, rule]) => `${name} ${valueText(rule)}`)
    .join(", ");
  const config = Object.entries(adapter.config).filter(([, value]) => value !== null);
  return [
    el("h3", {}, "Adapter"),
    facts([
      ["Kind", adapter.kind],
      ["Kept", `${format.percent(adapter.kept)} of ${format.count(adapter.weights)} weights`],
      ["Seed", adapter.seed],
      ["Initial values", initial],
      ["Check value", adapter.check],
      ["Stands at", `${plural(adapter.stands_at, "tensor")} of the base, fingerprinted`],
      ...config.map(([name, value]) => [name, valueText(value)]),
    ]),
    folded(
      plural(adapter.modules.length, "module"),
      table(
        ["module"],
        adapter.modules.map((name) => [name]),
      ),
    ),
  ];
}
