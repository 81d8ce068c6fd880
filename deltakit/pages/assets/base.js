// What every page is made of: its data, elements that hold text alone, sections, cards, tables.

const data = JSON.parse(document.getElementById("data").textContent);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : visible(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : visible(child));
  }
  return node;
}

/** An element. attributes: text, numbers, true, or functions (`onclick`); strings become text. */
function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for a drawing. */
function svg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** Append to the page; sections enter the contents. */
function add(...nodes) {
  document.getElementById("main").append(...nodes);
  for (const node of nodes) {
    if (!node.matches("section[id]")) continue;
    const title = node.querySelector("h2").textContent;
    document.getElementById("contents").append(el("a", { href: `#${node.id}` }, title));
  }
}

/** A part of the page under a heading. */
function section(title, ...children) {
  const id = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  return el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title),
    ...children,
  );
}

/** Figures to read first. */
function cards(facts) {
  const card = ({ label, value, note }) =>
    el(
      "div",
      {},
      el("dt", {}, label),
      el("dd", { class: visible(value).length >= 12 ? "long" : null }, value),
      note ? el("dd", { class: "note" }, note) : null,
    );
  return el("dl", { class: "cards" }, facts.map(card));
}

/** Parts of a section side by side, as far as there is room. */
function beside(...parts) {
  return el(
    "div",
    { class: "beside" },
    parts.map((part) => el("div", {}, part)),
  );
}

/** A chart under its title. about: one sentence that tells what it shows. table: its numbers. */
function figure({ title, about, node, table: numbers }) {
  return el(
    "figure",
    {},
    el("figcaption", {}, el("h3", {}, title), about ? el("p", {}, about) : null),
    node,
    numbers ? folded("As a table", numbers) : null,
  );
}

/** What unfolds under a line of text, and is not part of the page before. */
function folded(title, ...children) {
  const summary = el("summary", {}, title),
    box = el("details", {}, summary);
  summary.addEventListener("click", () => box.append(...children), { once: true }); // also by keys
  return box;
}

/** Rows of text, numbers or nodes. right: positions of the columns that hold numbers. */
function table(heads, rows, { right = [], label = heads.join(", ") } = {}) {
  const side = (column) => (right.includes(column) ? "right" : null);
  const head = heads.map((text, i) => el("th", { scope: "col", class: side(i) }, text));
  const body = rows.map((row) =>
    el(
      "tr",
      {},
      row.map((cell, i) => el("td", { class: side(i) }, cell)),
    ),
  );
  return scrollable(
    el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)),
    label,
  );
}

/** Names and what is known of them, in as many columns as there is room for. */
function facts(pairs) {
  return el(
    "dl",
    { class: "facts" },
    pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}

/** A box that scrolls by itself; it can be focused while it has something to scroll. */
function scrollable(node, label) {
  const box = el("div", { class: "scroll" }, node);
  const update = () => {
    const over = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    for (const [name, value] of Object.entries({
      tabindex: 0,
      role: "group",
      "aria-label": visible(label),
    })) {
      if (over) box.setAttribute(name, value);
      else box.removeAttribute(name);
    }
  };
  const observer = new ResizeObserver(update);
  for (const part of [box, node]) observer.observe(part);
  return box;
}

/** One of a few choices; `choose` is called with each one that is picked. */
function choice(label, options, choose) {
  const name = `choice-${document.querySelectorAll("fieldset").length}-${label}`;
  const radio = (option, i) =>
    el(
      "label",
      {},
      el("input", { type: "radio", name, checked: i === 0, onchange: () => choose(option) }),
      option,
    );
  return el("fieldset", { class: "choice" }, el("legend", {}, label), options.map(radio));
}

document.getElementById("theme").addEventListener("click", ({ currentTarget: button }) => {
  const themes = ["auto", "light", "dark"];
  const now = document.documentElement.dataset.theme ?? "auto";
  const next = themes[(themes.indexOf(now) + 1) % themes.length];
  document.documentElement.dataset.theme = next;
  button.textContent = `Theme: ${next}`;
});
