// Histograms.

/**
 * edges: n + 1 rising numbers; series: [{name, counts}], n counts each; x, y: as for lines. Several
 * series stand side by side in each bin; with mirror the second of two hangs below the axis.
 */
function bars({ edges, series, x, y, mirror = false }) {
  const counts = series.map((one, i) => one.counts.map((count) => (mirror && i ? -count : count)));
  const [from, to] = mirror
    ? mirrored(counts)
    : domain(counts.flat(), { ...y, min: y.log ? 0.5 : 0 });
  const yAxis = {
    ...y,
    whole: true,
    from,
    to,
    write: y.write ?? ((n) => format.short(Math.abs(n))),
  };
  const draw = (width) => {
    const height = Math.max(200, Math.min(300, Math.round(width * 0.36)));
    const box = frame(width, height, { ...x, from: edges[0], to: edges.at(-1) }, yAxis);
    const floor = box.toY(y.log ? from : 0),
      share = mirror ? 1 : 1 / series.length;
    counts.forEach((row, i) =>
      box.root.append(
        svg(
          "g",
          { class: `bars s${i % STYLES}` },
          row.map((count, bin) => {
            if (!count) return null;
            const left = box.toX(edges[bin]),
              whole = box.toX(edges[bin + 1]) - left;
            const gap = whole * share > 3 ? 1 : 0,
              top = box.toY(count);
            return svg("rect", {
              x: left + (mirror ? 0 : i * share * whole),
              width: Math.max(0.5, whole * share - gap),
              y: Math.min(top, floor),
              height: Math.max(1, Math.abs(floor - top)),
            });
          }),
        ),
      ),
    );
    if (mirror)
      box.root.append(
        svg("line", { class: "axis", x1: box.left, x2: box.right, y1: floor, y2: floor }),
      );
    return { frame: box, stops: barStops(edges, series, x, box) };
  };
  const chart = plot(`Histogram of ${x.label}: ${series.map((one) => one.name).join(", ")}.`, draw);
  return series.length < 2
    ? chart
    : el(
        "div",
        {},
        legend(
          series.map((one) => one.name),
          barSwatch,
        ),
        chart,
      );
}

function mirrored(counts) {
  const most = domain(counts.flat().map(Math.abs), { min: 0 })[1];
  return [counts[1]?.some(Boolean) ? -most : 0, most];
}

function barSwatch(index) {
  return svg(
    "g",
    { class: `bars s${index % STYLES}` },
    svg("rect", { x: 8, y: 0, width: 12, height: 12 }),
  );
}

function barStops(edges, series, x, box) {
  const write = x.write ?? format.number;
  return edges.slice(0, -1).map((edge, bin) => {
    const told = series.map(
      (one) => `${series.length > 1 ? `${one.name} ` : ""}${format.count(one.counts[bin])}`,
    );
    return {
      x: (box.toX(edge) + box.toX(edges[bin + 1])) / 2,
      text: `${x.label} ${write(edge)} to ${write(edges[bin + 1])}: ${told.join(" · ")}`,
    };
  });
}
