// A matrix of counts as a map, with the sums of its columns above and of its rows beside it.

/**
 * cells: [r][c] counts; rows, columns: {label, size, perBin, sums}, size: of the whole side. Cells
 * without entries stay empty.
 */
function joint({ cells, rows, columns }) {
  const shade = countShades(cells.flat());
  const draw = (width) => {
    const side = Math.max(48, Math.min(90, width * 0.16));
    const left = Math.max(
      34,
      14 +
        TEXT_WIDTH *
          Math.max(...ticks(0, rows.size, 5, { whole: true }).map((n) => format.short(n).length)),
    );
    const wide = Math.min(520, width - left - side - 10);
    const tall = Math.max(60, Math.min(wide, (wide * rows.size) / columns.size));
    const top = side + 24;
    const toX = scale(0, columns.size, left, left + wide),
      toY = scale(0, rows.size, top, top + tall);
    const at = (bin, axis, place) => place(Math.min(axis.size, bin * axis.perBin));
    const span = (bin, axis, place) => at(bin + 1, axis, place) - at(bin, axis, place);
    const across = sideScale(columns.sums, top - 6, 24),
      down = sideScale(rows.sums, left + wide + 6, left + wide + side);
    const root = svg(
      "svg",
      {
        width,
        height: top + tall + 44,
        viewBox: `0 0 ${width} ${top + tall + 44}`,
        "aria-hidden": "true",
      },
      svg("rect", { class: "field", x: left, y: top, width: wide, height: tall }),
      svg(
        "g",
        { class: "cells" },
        cells.flatMap((row, r) =>
          row.map((count, c) =>
            count
              ? svg("rect", {
                  x: at(c, columns, toX),
                  y: at(r, rows, toY),
                  width: span(c, columns, toX),
                  height: span(r, rows, toY),
                  fill: `rgb(${cividis(shade.share(count)).join(" ")})`,
                })
              : null,
          ),
        ),
      ),
      svg(
        "g",
        { class: "bars s0" },
        columns.sums.map((sum, c) =>
          svg("rect", {
            x: at(c, columns, toX),
            y: across(sum),
            width: Math.max(0.5, span(c, columns, toX) - 0.5),
            height: across(0) - across(sum),
          }),
        ),
        rows.sums.map((sum, r) =>
          svg("rect", {
            x: down(0),
            y: at(r, rows, toY),
            width: down(sum) - down(0),
            height: Math.max(0.5, span(r, rows, toY) - 0.5),
          }),
        ),
      ),
      sideTicks(columns, toX, Math.floor(wide / 70)).map((n) =>
        svg("text", { x: toX(n), y: top + tall + 17, "text-anchor": "middle" }, format.short(n)),
      ),
      sideTicks(rows, toY, Math.floor(tall / 40)).map((n) =>
        svg("text", { x: left - 7, y: toY(n) + 4, "text-anchor": "end" }, format.short(n)),
      ),
      svg("text", { class: "label", x: 0, y: top - 8 }, rows.label),
      svg(
        "text",
        { class: "label", x: left + wide, y: top + tall + 36, "text-anchor": "end" },
        columns.label,
      ),
      svg(
        "text",
        { x: left, y: 12 },
        `up to ${format.count(Math.max(...columns.sums))} per column, ${format.count(Math.max(...rows.sums))} per row`,
      ),
    );
    const stops = cells.flatMap((row, r) =>
      row.map((count, c) => {
        const [x, y] = [at(c, columns, toX), at(r, rows, toY)];
        return {
          x: x + span(c, columns, toX) / 2,
          y: y + span(r, rows, toY) / 2,
          text: `${binText(rows, r)}, ${binText(columns, c)}: ${format.count(count)}`,
          guide: () =>
            svg("rect", {
              class: "guide cell",
              x,
              y,
              width: span(c, columns, toX),
              height: span(r, rows, toY),
            }),
        };
      }),
    );
    return { frame: { root }, stops, stride: columns.sums.length };
  };
  return el(
    "div",
    {},
    plot(`Map of entries over ${rows.label} and ${columns.label}.`, draw),
    colourKey(shade, format.count, { label: "entries per cell", log: true }),
  );
}

/** Shades of counts from 1 on, of which the least still stands out from an empty cell. */
function countShades(counts) {
  const most = Math.max(1, ...counts);
  const share = (count) => (most === 1 ? 0.6 : Math.log1p(count) / Math.log1p(most));
  return { least: 1, most, lowest: share(1), share };
}

function sideScale(sums, start, end) {
  return scale(0, Math.max(1, ...sums), start, end);
}

function sideTicks(axis, place, count) {
  return ticks(0, axis.size, Math.max(1, count), { whole: true });
}

/** The rows or columns of one bin: "rows 24 to 35". */
function binText({ label, size, perBin }, bin) {
  const first = bin * perBin,
    last = Math.min(size, first + perBin) - 1;
  return first === last
    ? `${label} ${format.count(first)}`
    : `${label} ${format.count(first)} to ${format.count(last)}`;
}
