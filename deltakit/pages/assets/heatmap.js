// Colours of a sequential scale, and a table of cells in them.

// cividis (Nuñez, Anderton and Renslow 2018) at eleven places, from low to high.
const CIVIDIS = [
  "00224e",
  "083370",
  "35456c",
  "4f576c",
  "666970",
  "7d7c78",
  "948e77",
  "aea371",
  "c8b866",
  "e5cf52",
  "fee838",
].map((code) => [0, 2, 4].map((at) => parseInt(code.slice(at, at + 2), 16)));

const NUMBERED = 12; // columns up to which cells show their numbers
const TALL = 48; // rows up to which a table stands on the page at its full height

/** Red, green and blue of a share in [0, 1]. */
function cividis(share) {
  const place = Math.max(0, Math.min(1, share)) * (CIVIDIS.length - 1);
  const low = CIVIDIS[Math.floor(place)],
    high = CIVIDIS[Math.ceil(place)];
  return low.map((value, i) => Math.round(value + (high[i] - value) * (place % 1)));
}

/** A function from values to shares of a scale {log, min, max}; min and max come from the values. */
function shades(values, { log, min, max } = {}) {
  const told = values.filter((x) => Number.isFinite(x) && (!log || x > 0));
  const least = min ?? told.reduce((a, b) => Math.min(a, b), Infinity);
  const most = max ?? told.reduce((a, b) => Math.max(a, b), -Infinity);
  const place = scale(least, most, 0, 1, log);
  return {
    least,
    most,
    lowest: 0,
    share: (x) => (log && x <= 0 ? 0 : least === most ? 0.5 : place(x)),
  };
}

function paint(cell, share) {
  const colour = cividis(share);
  const [r, g, b] = colour.map((c) => ((c / 255 + 0.055) / 1.055) ** 2.4);
  cell.style.backgroundColor = `rgb(${colour.join(" ")})`;
  cell.style.color = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

/**
 * A table of coloured cells. rows, columns: their names; values: [rows][columns], null where a cell
 * is empty; format: writes a value; label: what the table is called; scale: {label, log, min, max};
 * pick(row, column): called for a cell by a click or Enter. Arrow keys move. holds(row, column): for
 * cells without a value that can be picked all the same; empty: what the others are called.
 */
function heatmap({
  rows,
  columns,
  values,
  format: write,
  label,
  scale: colours = {},
  pick,
  holds = () => false,
  empty = "no tensor",
}) {
  const shade = shades(values.flat(), colours);
  const readout = el("p", { class: "readout" });
  const size = `${columns.length > NUMBERED ? " dense" : ""}${rows.length > TALL ? " tall" : ""}`;
  const grid = el(
    "table",
    { class: `heat${size}`, role: "grid", "aria-label": label },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("td", {}),
        columns.map((name) => el("th", { scope: "col", title: name }, el("span", {}, name))),
      ),
    ),
    el(
      "tbody",
      {},
      rows.map((name, r) =>
        el(
          "tr",
          {},
          el("th", { scope: "row", title: name }, el("span", {}, name)),
          columns.map((_, c) =>
            heatCell(values[r][c], write, shade, holds(r, c), empty, columns.length),
          ),
        ),
      ),
    ),
  );
  const cells = [...grid.tBodies[0].rows].map((row) => [...row.cells].slice(1));
  cells[0]?.[0]?.setAttribute("tabindex", 0);
  grid.style.width = `${14 + 5 * columns.length}rem`; // wide cells where there is room
  const find = (target) => {
    const cell = target.closest("td[role=gridcell]");
    return cell ? [cell.parentNode.rowIndex - 1, cell.cellIndex - 1] : null;
  };
  const tell = ([r, c]) => {
    const told = values[r][c] === null ? (holds(r, c) ? "unknown" : empty) : write(values[r][c]);
    readout.textContent = visible(`${rows[r]} · ${columns[c]}: ${told}`);
  };
  const choose = ([r, c]) => {
    if (!pick || (values[r][c] === null && !holds(r, c))) return;
    grid.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    cells[r][c].setAttribute("aria-selected", "true");
    focusCell(grid, cells[r][c]);
    pick(r, c);
  };
  for (const name of ["pointerover", "focusin"]) {
    grid.addEventListener(name, (event) => find(event.target) && tell(find(event.target)));
  }
  grid.addEventListener("click", (event) => find(event.target) && choose(find(event.target)));
  grid.addEventListener("keydown", (event) => {
    const at = find(event.target);
    if (!at) return;
    const next = neighbour(event.key, at, rows.length, columns.length);
    if (event.key === "Enter" || event.key === " ") choose(at);
    else if (!next) return;
    else focusCell(grid, cells[next[0]][next[1]]);
    event.preventDefault();
  });
  return el("div", {}, scrollable(grid, label), readout, colourKey(shade, write, colours));
}

function heatCell(value, write, shade, held, empty, columns) {
  const known = value !== null && value !== undefined;
  const told = known ? write(value) : held ? "unknown" : empty;
  const cell = el(
    "td",
    {
      role: "gridcell",
      tabindex: -1,
      class: known ? null : held ? "unknown" : "none",
      "aria-label": told,
    },
    columns <= NUMBERED ? (known ? told : held ? "?" : "") : "",
  );
  if (known) paint(cell, shade.share(value));
  return cell;
}

function neighbour(key, [row, column], rows, columns) {
  const moves = {
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
    Home: [0, -columns],
    End: [0, columns],
    PageUp: [-rows, 0],
    PageDown: [rows, 0],
  };
  const move = moves[key];
  const within = (at, size) => Math.max(0, Math.min(size - 1, at));
  return move && [within(row + move[0], rows), within(column + move[1], columns)];
}

function focusCell(grid, cell) {
  grid.querySelector("td[tabindex='0']")?.setAttribute("tabindex", -1);
  cell.setAttribute("tabindex", 0);
  cell.focus();
}

/** The colours from least to most, with both ends written. */
function colourKey(shade, write, { label, log }) {
  if (!Number.isFinite(shade.least)) return el("p", { class: "key" }, "Nothing is known here.");
  if (shade.least === shade.most)
    return el("p", { class: "key" }, `${label ?? ""} ${write(shade.least)} everywhere`);
  const strip = el(
    "span",
    { class: "strip", "aria-hidden": "true" },
    Array.from({ length: 24 }, (_, i) => {
      const piece = el("span", {});
      paint(piece, shade.lowest + ((1 - shade.lowest) * i) / 23);
      return piece;
    }),
  );
  return el(
    "p",
    { class: "key" },
    `${label ?? ""} ${write(shade.least)} `,
    strip,
    ` ${write(shade.most)}${log ? ", logarithmic" : ""}`,
  );
}
