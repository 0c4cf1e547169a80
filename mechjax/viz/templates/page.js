"use strict";
// Four small comforts; the page says everything without them. (1) light or dark, (2) what a cell means, when pointed at,
// (3) a chosen token shows its row of the attention table, which is where the numbers are read from, (4) an edge lights up
// with its row, and a node with its edges, when pointed at.
(() => {
  const root = document.documentElement, tip = document.getElementById("tip");

  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const place = (x, y) => {
    const box = tip.getBoundingClientRect(), room = document.documentElement.clientWidth;
    tip.style.left = Math.max(8, Math.min(x - box.width / 2, room - box.width - 8)) + "px";
    tip.style.top = (y - box.height - 14 > 8 ? y - box.height - 14 : y + 20) + "px";
  };
  const show = (event) => {
    const cell = event.target.closest("[data-tip]");
    tip.hidden = !cell;
    if (!cell) return;
    tip.textContent = cell.dataset.tip;
    const box = cell.getBoundingClientRect();
    place(box.left + box.width / 2, box.top);
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

  for (const figure of document.querySelectorAll(".attention")) {
    const tokens = [...figure.querySelectorAll(".look .tok")], rows = figure.querySelectorAll("tbody tr");
    tokens.forEach((token, query) => token.addEventListener("click", () => {
      const cells = rows[query].querySelectorAll("td");
      tokens.forEach((other, key) => {
        const share = Number(cells[key].textContent);
        other.classList.toggle("from", key === query);
        other.classList.toggle("hi", share > 0.72);
        other.classList.toggle("mid", share > 0.5 && share <= 0.72);
        other.setAttribute("aria-pressed", String(key === query));
        other.setAttribute("style", "--v:" + share);
        other.dataset.tip = token.textContent + " → " + other.textContent + ": " + cells[key].textContent;
      });
    }));
  }

  for (const view of document.querySelectorAll(".circuit")) {
    const edges = [...view.querySelectorAll("[data-edge]")], drawn = view.querySelectorAll("g[data-edge]");
    const ends = new Map([...drawn].map((edge) => [edge.dataset.edge, [edge.dataset.from, edge.dataset.to]]));
    view.addEventListener("pointerover", (event) => {
      const edge = event.target.closest("[data-edge]"), node = event.target.closest("[data-node]");
      const on = (one) => edge ? one.dataset.edge === edge.dataset.edge
        : Boolean(node) && ends.get(one.dataset.edge).includes(node.dataset.node);
      view.classList.toggle("lit", Boolean(edge || node));
      for (const one of edges) one.classList.toggle("on", on(one));
    });
    view.addEventListener("pointerleave", () => {
      view.classList.remove("lit");
      for (const one of edges) one.classList.remove("on");
    });
  }
})();
