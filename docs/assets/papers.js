// Facets, text filter and sorting of the paper index. The list itself is in the page; without this script it stays as it is.
// State lives in the address (?q=…&leaf=…&leaf=…&sort=…), so that a view can be shared and the back button undoes a choice.
(function () {
  "use strict";
  const form = document.getElementById("lc-form");
  const list = document.getElementById("lc-papers");
  if (!form || !list) return;

  const FACETS = ["leaf", "mechanism", "stage", "modality", "year", "venue", "has", "status"];
  // Papers must have all chosen values of these facets; of the others any one is enough.
  const ALL_OF = new Set(["has"]);
  const query = form.elements.q;
  const sort = form.elements.sort;
  const count = document.getElementById("lc-count");
  const empty = document.getElementById("lc-empty");
  const clear = document.getElementById("lc-clear");
  const boxes = Array.from(form.querySelectorAll("input[type=checkbox]"));
  const outputs = new Map(boxes.map((box) => [box, box.parentElement.querySelector("output")]));

  const papers = Array.from(list.children, function (item, place) {
    const values = {};
    for (const facet of FACETS) values[facet] = new Set((item.dataset[facet] || "").split(" ").filter(Boolean));
    // A branch of the taxonomy holds the papers of its leaves.
    for (const leaf of Array.from(values.leaf)) values.leaf.add(leaf.split("/")[0]);
    const title = item.querySelector(".lc-title").textContent;
    return {
      item, values, title, place,
      text: fold(title + " " + item.querySelector(".lc-meta").textContent + " " + item.dataset.q),
      date: item.dataset.date,
      added: item.dataset.added,
    };
  });

  const collator = new Intl.Collator("en", { sensitivity: "base", numeric: true });
  const ORDERS = {
    newest: (a, b) => a.place - b.place,
    oldest: (a, b) => compare(a.date || "9999", b.date || "9999") || collator.compare(a.title, b.title),
    title: (a, b) => collator.compare(a.title, b.title) || a.place - b.place,
    added: (a, b) => compare(b.added, a.added) || a.place - b.place,
  };
  let order = "newest";

  function compare(a, b) {
    return a < b ? -1 : a > b ? 1 : 0;
  }

  function fold(text) {
    return text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  }

  function chosen() {
    const state = {};
    for (const facet of FACETS) state[facet] = [];
    for (const box of boxes) if (box.checked) state[box.name].push(box.value);
    return state;
  }

  function passes(paper, facet, values) {
    if (!values.length) return true;
    const test = (value) => paper.values[facet].has(value);
    return ALL_OF.has(facet) ? values.every(test) : values.some(test);
  }

  function apply() {
    const words = fold(query.value).split(/\s+/).filter(Boolean);
    const state = chosen();
    const counts = new Map(boxes.map((box) => [box.name + " " + box.value, 0]));
    let shown = 0;
    for (const paper of papers) {
      const textFits = words.every((word) => paper.text.includes(word));
      const failed = textFits ? FACETS.filter((facet) => !passes(paper, facet, state[facet])) : null;
      const visible = failed !== null && failed.length === 0;
      paper.item.hidden = !visible;
      if (visible) shown += 1;
      if (failed === null || failed.length > 1) continue;
      // The number beside a value: what choosing it would show, given all other facets.
      for (const facet of failed.length ? failed : FACETS) {
        if (ALL_OF.has(facet) && failed.length) continue;
        for (const value of paper.values[facet]) {
          const name = facet + " " + value;
          if (counts.has(name)) counts.set(name, counts.get(name) + 1);
        }
      }
    }
    for (const box of boxes) {
      const number = counts.get(box.name + " " + box.value);
      outputs.get(box).textContent = String(number);
      box.closest("label").classList.toggle("lc-zero", number === 0 && !box.checked);
    }
    let filters = 0;
    for (const facet of FACETS) {
      const number = state[facet].length;
      filters += number;
      const mark = form.querySelector('[data-chosen="' + facet + '"]');
      if (mark) mark.textContent = number ? number + " chosen" : "";
    }
    if (sort.value !== order) {
      order = sort.value;
      list.append(...papers.slice().sort(ORDERS[order]).map((paper) => paper.item));
    }
    const filtered = filters > 0 || words.length > 0;
    clear.hidden = !filtered;
    empty.hidden = shown > 0;
    const text = filtered ? shown + " of " + papers.length + " papers" : papers.length + " papers";
    if (count.textContent !== text) count.textContent = text;
  }

  function address() {
    const params = new URLSearchParams();
    if (query.value.trim()) params.set("q", query.value.trim());
    for (const box of boxes) if (box.checked) params.append(box.name, box.value);
    if (sort.value !== "newest") params.set("sort", sort.value);
    const text = params.toString();
    return window.location.pathname + (text ? "?" + text : "");
  }

  function remember(push) {
    try {
      if (push) window.history.pushState(null, "", address());
      else window.history.replaceState(null, "", address());
    } catch (error) {
      // A page opened from disk may not change its address; filtering works all the same.
    }
  }

  function restore() {
    const params = new URLSearchParams(window.location.search);
    query.value = (params.get("q") || "").slice(0, 200);
    for (const box of boxes) box.checked = params.getAll(box.name).includes(box.value);
    sort.value = Object.hasOwn(ORDERS, params.get("sort") || "") ? params.get("sort") : "newest";
    for (const facet of form.querySelectorAll(".lc-facet")) {
      if (facet.querySelector("input:checked")) facet.open = true;
    }
    apply();
  }

  let waiting = 0;
  query.addEventListener("input", function () {
    window.clearTimeout(waiting);
    waiting = window.setTimeout(function () {
      apply();
      remember(false);
    }, 120);
  });
  form.addEventListener("change", function (event) {
    if (event.target === query) return;
    apply();
    remember(true);
  });
  form.addEventListener("submit", function (event) {
    event.preventDefault();
    window.clearTimeout(waiting);
    apply();
    remember(false);
  });
  clear.addEventListener("click", function () {
    query.value = "";
    for (const box of boxes) box.checked = false;
    apply();
    remember(true);
    query.focus();
  });
  window.addEventListener("popstate", restore);

  form.hidden = false;
  form.parentElement.classList.add("lc-live");
  if (window.matchMedia("(max-width: 60em)").matches) form.querySelector(".lc-all-facets").open = false;
  restore();
})();
