// A matrix of counts as a picture.

/** cells: [r][c] counts; label: for screen readers. Empty cells stay transparent. */
function raster({ cells, label, log = true }) {
  const shade = shades(cells.flat(), { log });
  const canvas = el("canvas", { width: cells[0]?.length ?? 0, height: cells.length, class: "raster", role: "img", "aria-label": label });
  const picture = canvas.getContext("2d");
  cells.forEach((row, r) => row.forEach((count, c) => {
    if (!count) return;
    picture.fillStyle = `rgb(${cividis(shade.share(count)).join(" ")})`;
    picture.fillRect(c, r, 1, 1);
  }));
  return canvas;
}
