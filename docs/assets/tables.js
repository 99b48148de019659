// Wide tables and formulas stand in boxes that scroll sideways. A box that has something to scroll must be reachable by keyboard.
window.addEventListener("load", function () {
  "use strict";
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .lc-statistics, div.lc-math")) {
    if (box.scrollWidth <= box.clientWidth) continue;
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", box.matches("div.lc-math") ? "Formula, scrolls sideways" : "Table, scrolls sideways");
  }
});
