"use strict";
// A list of latents: (1) sorted by a column, (2) filtered by words, (3) a neighbour that is pointed to opens.
(() => {
  const list = document.querySelector(".latents");
  if (!list) return;
  const all = [...list.querySelectorAll(".latent")], holder = list.querySelector(".all"), said = list.querySelector(".count");
  const buttons = [...list.querySelectorAll(".sorts button")], words = list.querySelector("input");

  for (const button of buttons) button.addEventListener("click", () => {
    const way = button.getAttribute("aria-pressed") === "true" ? -Number(button.dataset.way) : Number(button.dataset.first);
    for (const other of buttons) {
      other.setAttribute("aria-pressed", String(other === button));
      delete other.dataset.way;
    }
    button.dataset.way = way;
    const of = (one) => Number(one.dataset[button.dataset.by]);
    holder.append(...[...all].sort((a, b) => way * (of(a) - of(b)) || Number(a.dataset.id) - Number(b.dataset.id)));
  });

  const filter = () => {
    const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const one of all) {
      one.hidden = !asked.every((word) => one.dataset.find.includes(word));
      n += !one.hidden;
    }
    said.textContent = asked.length ? `${n} of ${all.length}` : `${all.length}`;
  };
  words.addEventListener("input", filter);

  list.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']"), one = link && document.getElementById(link.hash.slice(1));
    if (!one) return;
    event.preventDefault();
    words.value = "";
    filter();
    one.open = true;
    one.scrollIntoView({ block: "center" });
    one.querySelector("summary").focus({ preventScroll: true });
  });
})();
