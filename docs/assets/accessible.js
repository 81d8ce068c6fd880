// What the theme leaves out for keyboards and screen readers: a name for the search, code that
// scrolls as a place to stop at, and landmarks that differ by name.
const mend = () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const nav of document.querySelectorAll("nav.md-code__nav")) {
    nav.setAttribute("role", "none");
    nav.removeAttribute("aria-label");
  }
  for (const nav of document.querySelectorAll("nav[data-md-level='2'][aria-labelledby]")) {
    const label = document.getElementById(nav.getAttribute("aria-labelledby"));
    nav.setAttribute("aria-label", `${label.textContent.trim()}: pages`);
    nav.removeAttribute("aria-labelledby");
  }
  for (const code of document.querySelectorAll("pre > code")) {
    code.tabIndex = code.scrollWidth > code.clientWidth ? 0 : -1;
  }
};
mend();
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", mend);
