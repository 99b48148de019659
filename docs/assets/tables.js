// The theme puts every table into a box that scrolls sideways. A box that has something to scroll must be reachable by keyboard.
window.addEventListener("load", function () {
  "use strict";
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .lc-statistics")) {
    if (box.scrollWidth <= box.clientWidth) continue;
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Table, scrolls sideways");
  }
});
