// Scales, ticks and the frame around a plot, and how its values are read by pointer and keys.

const TEXT_WIDTH = 6.6; // of a character of tick labels, in pixels

/** A function from [from, to] to pixels [start, end]. */
function scale(from, to, start, end, log) {
  const place = log ? Math.log10 : Number;
  const first = place(from),
    span = place(to) - first || 1;
  return (x) => start + ((end - start) * (place(x) - first)) / span;
}

/** The least of 1, 2, 5, 10, ... times a power of ten that is at least `size`. */
function niceStep(size) {
  const power = 10 ** Math.floor(Math.log10(size));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= size * (1 - 1e-9));
}

/** About `count` round numbers within [from, to], `least` at the least where there are so many. */
function ticks(from, to, count, { log, whole, least: needed = 1 } = {}) {
  if (log) {
    const powers = logTicks(from, to, count);
    if (powers.length > 1) return powers;
  }
  const least = niceStep((to - from || 1) / Math.max(count, 1));
  const step = whole ? Math.max(1, least) : least;
  const first = Math.ceil(from / step - 1e-9),
    last = Math.floor(to / step + 1e-9);
  if (last - first + 1 < needed && step === least)
    return ticks(from, to, count + 1, { whole, least: needed });
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) =>
    Number(((first + i) * step).toPrecision(12)),
  );
}

function logTicks(from, to, count) {
  const first = Math.ceil(Math.log10(from) - 1e-9),
    last = Math.floor(Math.log10(to) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first + 1) / count));
  const factors = last - first < 3 && (last - first) * 3 < count ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor((first - 1) / stride) * stride; power <= last; power += stride) {
    found.push(...factors.map((factor) => factor * 10 ** power));
  }
  return found
    .map((x) => Number(x.toPrecision(12)))
    .filter((x) => x >= from * (1 - 1e-9) && x <= to * (1 + 1e-9));
}

/** The ends of an axis for `values`: round, from 0 on where that is not far. */
function domain(values, { log, min, max } = {}) {
  const told = values.filter((x) => Number.isFinite(x) && (!log || x > 0));
  let least = min ?? told.reduce((a, b) => Math.min(a, b), Infinity);
  let most = max ?? told.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!told.length) [least, most] = log ? [1, 10] : [0, 1];
  if (log) return least < most ? [least, most] : [least / 2, most * 2];
  if (min === undefined && least >= 0 && least <= most / 2) least = 0;
  if (least === most)
    [least, most] = [least - (Math.abs(least) / 2 || 1), most + (Math.abs(most) / 2 || 1)];
  const step = niceStep((most - least) / 5);
  return [
    min ?? Math.floor(least / step + 1e-9) * step,
    max ?? Math.ceil(most / step - 1e-9) * step,
  ];
}

/** A drawing with two axes. x, y: {label, log, whole, from, to}; top: pixels kept free above. */
function frame(width, height, x, y, top = 0) {
  const upper = 30 + top,
    lower = height - 42;
  const yTicks = ticks(y.from, y.to, Math.floor((lower - upper) / 38), { ...y, least: 3 });
  const left = 14 + TEXT_WIDTH * Math.max(1, ...yTicks.map((value) => axisText(y, value).length));
  const right = width - 14;
  const toX = scale(x.from, x.to, left, right, x.log),
    toY = scale(y.from, y.to, lower, upper, y.log);
  const xTicks = fitting(x, Math.floor((right - left) / 60), toX);
  const root = svg(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    yTicks.map((value) =>
      svg(
        "g",
        { class: "tick" },
        svg("line", { x1: left, x2: right, y1: toY(value), y2: toY(value) }),
        svg("text", { x: left - 8, y: toY(value) + 4, "text-anchor": "end" }, axisText(y, value)),
      ),
    ),
    xTicks.map((value) =>
      svg(
        "g",
        { class: "tick" },
        svg("line", { x1: toX(value), x2: toX(value), y1: lower, y2: lower + 5 }),
        svg("text", { x: toX(value), y: lower + 19, "text-anchor": "middle" }, axisText(x, value)),
      ),
    ),
    svg("line", { class: "axis", x1: left, x2: right, y1: lower, y2: lower }),
    svg("text", { class: "label", x: 0, y: 12 }, y.label),
    svg("text", { class: "label", x: right, y: height - 6, "text-anchor": "end" }, x.label),
  );
  return { root, toX, toY, left, right, upper, lower };
}

function axisText(axis, value) {
  return axis.write ? axis.write(value) : format.short(value);
}

/** As many ticks of the axis as stand beside each other without touching. */
function fitting(axis, count, toX) {
  for (let wanted = Math.max(2, count); wanted > 1; wanted -= 1) {
    const found = ticks(axis.from, axis.to, wanted, axis);
    const clear = found.every((value, i) => {
      if (!i) return true;
      const letters = (axisText(axis, value).length + axisText(axis, found[i - 1]).length) / 2;
      return toX(value) - toX(found[i - 1]) > TEXT_WIDTH * letters + 10;
    });
    if (clear) return found;
  }
  return ticks(axis.from, axis.to, 1, axis).slice(0, 1);
}

/**
 * A box that draws itself anew for every width. draw(width) gives the frame and the stops at which
 * it can be read, [{x: pixels, text}] in rising order; those of a map also have y and a guide of
 * their own, and stand in rows of `stride`. Pointer and arrow keys go from stop to stop.
 */
function plot(label, draw) {
  const holder = el("div", { class: "drawing" });
  const readout = el("p", { class: "readout", role: "status" });
  const box = el(
    "div",
    { class: "plot", tabindex: 0, role: "img", "aria-label": `${label} Arrow keys read values.` },
    holder,
  );
  let drawn = null,
    at = -1;
  const show = (index) => {
    at = index;
    drawn.frame.root.querySelector(".guide")?.remove();
    readout.textContent = index < 0 ? "" : visible(drawn.stops[index].text);
    if (index < 0) return;
    const { x, guide } = drawn.stops[index],
      { root, upper, lower } = drawn.frame;
    root.append(
      guide ? guide() : svg("line", { class: "guide", x1: x, x2: x, y1: upper, y2: lower }),
    );
  };
  box.addEventListener("pointermove", (event) => {
    if (!drawn?.stops.length) return;
    const bounds = drawn.frame.root.getBoundingClientRect(),
      size = drawn.width / bounds.width;
    show(
      nearest(
        drawn.stops,
        (event.clientX - bounds.left) * size,
        (event.clientY - bounds.top) * size,
      ),
    );
  });
  box.addEventListener("pointerleave", () => drawn && show(-1));
  box.addEventListener("blur", () => drawn && show(-1));
  box.addEventListener("keydown", (event) => {
    if (!drawn?.stops.length) return;
    const rows = drawn.stride ?? 0,
      last = drawn.stops.length - 1;
    const step = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -rows,
      ArrowDown: rows,
      Home: -last,
      End: last,
    }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.max(0, Math.min(last, at + step)));
  });
  new ResizeObserver(([{ contentRect }]) => {
    const width = Math.floor(contentRect.width);
    if (!width || width === drawn?.width) return;
    drawn = { width, ...draw(width) };
    at = -1;
    holder.replaceChildren(drawn.frame.root);
  }).observe(holder);
  return el("div", {}, box, readout);
}

function nearest(stops, x, y) {
  const apart = (stop) => Math.abs(stop.x - x) + (stop.y === undefined ? 0 : Math.abs(stop.y - y));
  return stops.reduce((best, stop, i) => (apart(stop) < apart(stops[best]) ? i : best), 0);
}

/** What stands for each series: a piece of its line, or of its bar. */
function legend(names, swatch) {
  const item = (name, i) =>
    el("li", {}, svg("svg", { width: 28, height: 12, "aria-hidden": "true" }, swatch(i)), name);
  return el("ul", { class: "legend" }, names.map(item));
}
