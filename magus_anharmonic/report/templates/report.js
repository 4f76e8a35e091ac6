"use strict";
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = (cell.dataset.v ?? cell.textContent).trim();
    const number = Number(text);
    return text === "" || text === "–" ? null : Number.isFinite(number) ? number : text;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));

  const data = document.getElementById("scenes");
  if (!data) return;
  const scenes = JSON.parse(data.textContent);
  const box = document.getElementById("canvas");
  const select = document.getElementById("which");
  const stills = [...document.querySelectorAll(".gallery svg")];
  const captions = [...document.querySelectorAll(".gallery figcaption")];
  const webgl = () => {
    const probe = document.createElement("canvas");
    return Boolean(probe.getContext("webgl2") || probe.getContext("webgl"));
  };
  let viewer = null;
  let current = 0;

  function start() {
    box.replaceChildren();
    box.classList.add("live");
    const made = $3Dmol.createViewer(box, { backgroundAlpha: 0, antialias: true, disableFog: true });
    if (!made) return;
    viewer = made;
    document.querySelector(".controls").hidden = false;
    // the wheel scrolls the page; with Ctrl it zooms
    box.addEventListener("wheel", (event) => { if (!event.ctrlKey) event.stopPropagation(); }, true);
    show(current);
  }

  const point = ([x, y, z]) => ({ x, y, z });

  function home() {
    viewer.setView([0, 0, 0, 0, 0, 0, 0, 1]);
    viewer.zoomTo();
    viewer.rotate(-18, "vz");
    viewer.rotate(-72, "vx");
    viewer.zoom(1.05);
    viewer.render();
  }

  function show(index) {
    const scene = scenes[index];
    current = index;
    select.value = String(index);
    box.setAttribute("aria-label", scene.label);
    document.getElementById("hint").textContent = captions[index].innerText.replace(/\s*3D\s*$/, "").replace(/\n+/g, ", ");
    const legend = document.getElementById("legend");
    legend.replaceChildren(...scene.kinds.flatMap((kind) => {
      const dot = document.createElement("i");
      dot.style.background = kind.color;
      return [dot, kind.symbol];
    }));
    if (!viewer) {
      box.replaceChildren(stills[index].cloneNode(true));
      return;
    }
    viewer.removeAllShapes();
    for (const [kind, ...where] of scene.atoms) {
      viewer.addSphere({ center: point(where), radius: scene.kinds[kind].radius, color: scene.kinds[kind].color });
    }
    for (const [i, j] of scene.bonds) {
      viewer.addCylinder({ start: point(scene.atoms[i].slice(1)), end: point(scene.atoms[j].slice(1)), radius: 0.07, color: "#98a3af", fromCap: 0, toCap: 0 });
    }
    for (let i = 0; i < 8; i += 1) {
      for (const bit of [1, 2, 4]) {
        if (!(i & bit)) viewer.addCylinder({ start: point(scene.corners[i]), end: point(scene.corners[i | bit]), radius: 0.02, color: "#77828f", fromCap: 1, toCap: 1 });
      }
    }
    home();
  }

  const turn = (axis, angle) => { viewer.rotate(angle, `v${axis}`); viewer.render(); };
  const zoom = (factor) => { viewer.zoom(factor); viewer.render(); };

  select.addEventListener("change", () => show(Number(select.value)));
  for (const link of document.querySelectorAll("[data-show]")) {
    link.addEventListener("click", () => { show(Number(link.dataset.show)); box.focus({ preventScroll: true }); });
  }
  document.querySelector(".controls").addEventListener("click", (event) => {
    const { turn: to, zoom: by, reset } = event.target.dataset;
    if (to) turn(to.split(",")[0], Number(to.split(",")[1]));
    if (by) zoom(Number(by));
    if (reset !== undefined) home();
  });
  box.addEventListener("keydown", (event) => {
    if (!viewer) return;
    const turns = { ArrowLeft: ["y", -15], ArrowRight: ["y", 15], ArrowUp: ["x", -15], ArrowDown: ["x", 15] };
    if (turns[event.key]) turn(...turns[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(1.25);
    else if (event.key === "-") zoom(0.8);
    else if (event.key === "Home") home();
    else return;
    event.preventDefault();
  });
  show(0);
  if (!webgl()) return;
  // a page opened in the background has no size yet, and WebGL cannot draw into nothing
  new ResizeObserver(() => {
    if (!box.clientWidth || !box.clientHeight) return;
    if (!viewer) start();
    else { viewer.resize(); viewer.render(); }
  }).observe(box);
})();
