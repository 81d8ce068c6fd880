// Lines over a common axis, told apart by colour, dashes and markers.

const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4", "12 4", "1 4"];
const MARKERS = [
  (x, y) => svg("circle", { cx: x, cy: y, r: 3.5 }),
  (x, y) => svg("rect", { x: x - 3, y: y - 3, width: 6, height: 6 }),
  (x, y) => svg("path", { d: `M${x} ${y - 4}l4 7h-8z` }),
  (x, y) => svg("path", { d: `M${x} ${y - 4.5}l4.5 4.5l-4.5 4.5l-4.5 -4.5z` }),
  (x, y) => svg("path", { d: `M${x} ${y + 4}l4 -7h-8z` }),
  (x, y) => svg("path", { d: `M${x - 4} ${y - 1}h3v-3h2v3h3v2h-3v3h-2v-3h-3z` }),
  (x, y) => svg("rect", { x: x - 4, y: y - 1.5, width: 8, height: 3 }),
];
const STYLES = 7;

/**
 * series: [{name, x, y}], y null where there is none; x, y: {label, log, min, max, whole, write};
 * marks: [{x, label}], places on the x axis. step: lines keep their value until the next point.
 */
function lines({ series, x, y, marks = [], step = false }) {
  const xs = series.flatMap((one) => one.x).concat(marks.map((mark) => mark.x));
  const [xFrom, xTo] = tight(xs, x);
  const [yFrom, yTo] = domain(
    series.flatMap((one) => one.y),
    y,
  );
  const drawable = (one) =>
    one.x
      .map((at, i) => [at, one.y[i]])
      .filter(
        ([a, b]) =>
          Number.isFinite(a) &&
          (b === null || Number.isFinite(b)) &&
          (!x.log || a > 0) &&
          (!y.log || b === null || b > 0),
      );
  const draw = (width) => {
    const rows = markRows(marks, (at) => scale(xFrom, xTo, 60, width - 14, x.log)(at), width);
    const height = Math.max(220, Math.min(340, Math.round(width * 0.42)));
    const box = frame(
      width,
      height,
      { ...x, from: xFrom, to: xTo },
      { ...y, from: yFrom, to: yTo },
      marks.length ? 16 * (Math.max(...rows) + 1) : 0,
    );
    marks.forEach((mark, i) => box.root.append(drawnMark(mark, box, 34 + 16 * rows[i], width)));
    series.forEach((one, i) => box.root.append(drawnLine(drawable(one), box, i, step)));
    return { frame: box, stops: lineStops(series, x, y, box) };
  };
  const label = `Line chart of ${y.label} against ${x.label}: ${series.map((one) => one.name).join(", ")}.`;
  const chart = plot(label, draw);
  return series.length < 2
    ? chart
    : el(
        "div",
        {},
        legend(
          series.map((one) => one.name),
          lineSwatch,
        ),
        chart,
      );
}

/** The ends of an axis that need not be round. */
function tight(values, axis) {
  const told = values.filter((value) => Number.isFinite(value) && (!axis.log || value > 0));
  const least = axis.min ?? told.reduce((a, b) => Math.min(a, b), Infinity);
  const most = axis.max ?? told.reduce((a, b) => Math.max(a, b), -Infinity);
  return least < most ? [least, most] : domain(values, axis);
}

function drawnLine(points, box, index, step) {
  const places = points.map(([a, b]) => (b === null ? null : [box.toX(a), box.toY(b)]));
  let path = "";
  places.forEach((place, i) => {
    if (!place) return;
    const before = places[i - 1];
    if (!before) path += `M${place[0].toFixed(1)} ${place[1].toFixed(1)}`;
    else
      path += `${step ? `H${place[0].toFixed(1)}` : ""}L${place[0].toFixed(1)} ${place[1].toFixed(1)}`;
  });
  const every = Math.ceil(places.length / 24);
  const marked = places.filter((place, i) => place && (i % every === 0 || i === places.length - 1));
  const marker = MARKERS[index % STYLES];
  return svg(
    "g",
    { class: `series s${index % STYLES}` },
    svg("path", { class: "line", d: path, "stroke-dasharray": DASHES[index % STYLES] }),
    every > 1
      ? marked.filter((_, i) => i % 4 === index % 4).map(([a, b]) => marker(a, b))
      : marked.map(([a, b]) => marker(a, b)),
  );
}

function lineSwatch(index) {
  return svg(
    "g",
    { class: `series s${index % STYLES}` },
    svg("line", {
      class: "line",
      x1: 0,
      x2: 28,
      y1: 6,
      y2: 6,
      "stroke-dasharray": DASHES[index % STYLES],
    }),
    MARKERS[index % STYLES](14, 6),
  );
}

function lineStops(series, x, y, box) {
  const told = series.map((one) => new Map(one.x.map((at, i) => [at, one.y[i]])));
  const places = [...new Set(series.flatMap((one) => one.x))]
    .filter((at) => !x.log || at > 0)
    .sort((a, b) => a - b);
  return places.map((at) => {
    const values = series.flatMap((one, i) => {
      const value = told[i].get(at);
      return value === null || value === undefined
        ? []
        : [`${series.length > 1 ? `${one.name} ` : ""}${readText(y, value)}`];
    });
    return { x: box.toX(at), text: `${x.label} ${readText(x, at)}: ${values.join(" · ")}` };
  });
}

function readText(axis, value) {
  if (axis.write) return axis.write(value);
  return Number.isInteger(value) ? format.count(value) : format.number(value);
}

/** The row of each mark's label, so that no two of them overlap. */
function markRows(marks, toX, width) {
  const ends = [];
  return marks.map((mark) => {
    const half = (mark.label.length * TEXT_WIDTH) / 2 + 6;
    const at = Math.max(half, Math.min(width - half, toX(mark.x)));
    let row = ends.findIndex((end) => end < at - half);
    if (row < 0) row = ends.length;
    ends[row] = at + half;
    return row;
  });
}

function drawnMark(mark, box, y, width) {
  const x = box.toX(mark.x),
    half = (mark.label.length * TEXT_WIDTH) / 2;
  const at = Math.max(half, Math.min(width - half, x));
  return svg(
    "g",
    { class: "mark" },
    svg("line", { x1: x, x2: x, y1: y + 4, y2: box.lower }),
    svg("text", { x: at, y, "text-anchor": "middle" }, mark.label),
  );
}
