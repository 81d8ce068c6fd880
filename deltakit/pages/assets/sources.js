// What a delta says of itself: its size by part, its adapter, extras, base and provenance.

const PARTS = { header: "Header", indices: "Places (indices)", values: "Values", order: "Order of joining", base_values: "Base values", extras: "Extras" };

function costs() {
  const { bytes: sizes } = data;
  const parts = Object.entries(PARTS).filter(([part]) => sizes[part]);
  const perEntry = (size) => (data.entries ? bitsPerEntry(size) : "");
  const row = (name, size, remark) => [name, format.bytes(size), perEntry(size), remark];
  const rows = parts.map(([part, name]) => row(name, sizes[part], meter(sizes[part] / sizes.file)));
  rows.push(row("File", sizes.file, ""));
  if (data.entries) {
    const over = sizes.support_entropy >= 1 ? `places take ${(sizes.indices / sizes.support_entropy).toFixed(3)} times this` : "";
    rows.push(row("Entropy of the supports", sizes.support_entropy, over));
    const bare = sizes.file - sizes.extras;
    rows.push(row("Raw coordinates, int64 and float32", sizes.raw_coo, `${(sizes.raw_coo / bare).toFixed(2)} times the file${sizes.extras ? " without extras" : ""}`));
  }
  add(section("What it costs", table(["part", "size", "bits per entry", "share of the file"], rows, { right: [1, 2], label: "Size of the file by part" })));
}

function meter(share) {
  const bar = el("span", { class: "meter", "aria-hidden": "true" }, el("span", {}));
  bar.firstChild.style.width = `${100 * share}%`;
  return el("span", { class: "metered" }, bar, format.percent(share));
}

function records() {
  const { adapter, extras, base, config, provenance } = data;
  if (adapter) {
    const rules = Object.entries(adapter.initial).map(([name, rule]) => `${name} ${valueText(rule)}`).join(", ");
    add(section("Adapter", facts([["Kind", adapter.kind], ["Kept", `${format.percent(adapter.kept)} of ${format.count(adapter.weights)} weights`],
      ["Seed", adapter.seed], ["Initial values", rules], ["Check value", adapter.check], ["Stands at", `${plural(adapter.stands_at, "tensor")} of the base, fingerprinted`],
      ...Object.entries(adapter.config).filter(([, value]) => value !== null).map(([name, value]) => [name, valueText(value)])]),
      folded(plural(adapter.modules.length, "module"), table(["module"], adapter.modules.map((name) => [name])))));
  }
  if (extras.length) {
    add(section("Extras", el("p", { class: "soft" }, "Whole tensors, stored beside the entries and outside the budget."),
      table(["tensor", "shape", "dtype"], extras.map((one) => [one.name, shape(one.shape), one.dtype]))));
  }
  const known = base === null ? [] : [["Model", base.model_id ?? "no id recorded"], ["Revision", base.revision ?? "not recorded"],
    ["Weights", base.total_weights === null ? "not recorded" : format.count(base.total_weights)], ["Fingerprints", `of ${plural(base.tensors, "tensor")}`]];
  add(section("Base", base === null ? el("p", {}, "This delta does not record which base it belongs to.") : facts(known)));
  if (Object.keys(config).length) add(section("Changes of configuration", facts(Object.entries(config).map(([name, value]) => [name, valueText(value)]))));
  add(section("Provenance", Object.keys(provenance).length
    ? facts(Object.entries(provenance).map(([name, value]) => [name, valueText(value)]))
    : el("p", {}, "This delta does not record how it was made.")));
}
