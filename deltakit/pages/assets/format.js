"use strict";

// How numbers and names are written.

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** 10 to a whole power: 10⁻³. */
function powerOfTen(exponent) {
  const digits = [...String(Math.abs(exponent))].map((digit) => SUPERSCRIPTS[digit]).join("");
  return `10${exponent < 0 ? "⁻" : ""}${digits}`;
}

/** Three significant digits; very small and very large numbers as 1.23 × 10⁻⁵. */
function threeDigits(x) {
  const size = Math.abs(x);
  if (size === 0 || (size >= 1e-4 && size < 1e6)) {
    return x.toLocaleString("en", { maximumSignificantDigits: 3 });
  }
  const [digits, exponent] = x.toExponential(2).split("e");
  return `${Number(digits)} × ${powerOfTen(Number(exponent))}`;
}

/** A number in as few characters as it takes, for axes: 25k, 1.5M, 0.02, 10⁻⁵. */
function short(x) {
  const size = Math.abs(x);
  for (const [factor, unit] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (size >= factor) return `${Number((x / factor).toPrecision(3))}${unit}`;
  }
  if (size === 0 || size >= 1e-3) return String(Number(x.toPrecision(4)));
  const exponent = Math.floor(Math.log10(size) + 1e-9);
  const digits = Number((x / 10 ** exponent).toPrecision(3));
  return digits === 1 ? powerOfTen(exponent) : `${digits}·${powerOfTen(exponent)}`;
}

/** A size in bytes: 412 kB. */
function bytes(size) {
  for (const [factor, unit] of [
    [1e9, "GB"],
    [1e6, "MB"],
    [1e3, "kB"],
  ]) {
    const value = size / factor;
    if (value >= 1) return `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ${unit}`;
  }
  return `${Math.round(size)} B`;
}

const unknown = (write) => (x) => (x === null || x === undefined ? "unknown" : write(x));

// Each takes a number, or null for what is not known.
const format = {
  count: unknown((n) => n.toLocaleString("en", { maximumFractionDigits: 0 })),
  bytes: unknown(bytes),
  percent: unknown((share) => `${threeDigits(100 * share)} %`),
  number: unknown(threeDigits),
  short: unknown(short),
};

/** The text with what does not print (controls, marks of direction) written out: \u{202e}. */
function visible(text) {
  const hidden = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
  return String(text).replace(hidden, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}
