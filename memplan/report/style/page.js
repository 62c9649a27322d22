// The timeline: the pointer, or the slider's arrow keys, choose a moment whose bytes are listed below it.
for (const figure of document.querySelectorAll("figure.timeline")) {
  const { kinds, places, moments } = JSON.parse(figure.querySelector("script").textContent);
  const [svg, slider, output] = ["svg", "input", "output"].map((name) => figure.querySelector(name));
  const cursor = svg.querySelector(".cursor");
  const gib = (n) => (n ? (n < 0.005 ? "<0.01" : n.toFixed(2)) : "0.00") + " GiB";
  const show = () => {
    const [x, place, total, ...sizes] = moments[slider.value];
    cursor.setAttribute("x1", x + "%");
    cursor.setAttribute("x2", x + "%");
    slider.setAttribute("aria-valuetext", `${places[place]}: ${gib(total)}`);
    output.replaceChildren(...[["", places[place], total], ...kinds.map((kind, i) => [...kind, sizes[i]])].map(([key, label, n]) => {
      const part = document.createElement(key ? "span" : "strong");
      if (key) {
        const swatch = document.createElement("i");
        swatch.className = "swatch " + key;
        part.append(swatch);
      }
      part.append(`${label} ${gib(n)}`);
      return part;
    }));
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 100;
    const last = moments.findLastIndex(([start]) => start <= x);
    slider.value = Math.max(0, last);
    cursor.style.visibility = "visible";
    show();
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  slider.addEventListener("input", () => { cursor.style.visibility = "visible"; show(); });
  slider.hidden = false;
  show();
}
