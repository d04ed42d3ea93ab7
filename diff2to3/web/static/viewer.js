"use strict";
// The page of one asset. facts: {name, about, home, photo (data: URL or null), note (what its .ply says)}

(async () => {
  const $ = (id) => document.getElementById(id), facts = JSON.parse($("facts").textContent);
  const fault = (message) => Object.assign($("fault"), { hidden: false, textContent: message });
  const backgrounds = ["#ffffff", "#808080", "#1c1c1e", null];
  let background = 0, stage;
  document.title = facts.name;
  $("about").textContent = facts.about;
  if (facts.photo) Object.assign($("photo"), { src: facts.photo, hidden: false });

  const actions = {
    t: ["Turntable", () => turn(!stage.turntable)],
    b: ["Background", () => paint(background + 1)],
    s: ["Picture", async () => save(await stage.picture({ background: backgrounds[background] }), facts.name + ".png")],
    p: ["Photo", () => ($("photo").hidden = !$("photo").hidden), facts.photo],
    d: [".ply", () => save(plyOf(stage.gaussians, facts.note), facts.name + ".ply")],
    r: ["Reset", () => stage.reset()],
    f: ["Full screen", () => (document.fullscreenElement ? document.exitFullscreen() : document.body.requestFullscreen())],
    h: ["?", () => ($("help").hidden = !$("help").hidden)],
  };
  const buttons = {};
  for (const [key, [label, act, present = true]] of Object.entries(actions)) {
    if (!present) continue;
    buttons[key] = Object.assign(document.createElement("button"), { textContent: label, title: "Key " + key.toUpperCase(), onclick: act });
    $("bar").append(buttons[key]);
  }
  function turn(on) {
    stage.turntable = on;
    buttons.t.setAttribute("aria-pressed", on);
    stage.touch();
  }
  function paint(number) {
    background = number % backgrounds.length;
    const squares = "repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 0 / 24px 24px";
    document.body.style.setProperty("--back", backgrounds[background] ?? squares);
    document.body.classList.toggle("dark", background === 2);
  }

  try {
    const canvas = document.querySelector("canvas");
    stage = window.stage = new Stage(canvas, facts.home, fault);
    canvas.addEventListener("stopped", () => buttons.t.setAttribute("aria-pressed", false));
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !stage.gaussians) return;
      const key = event.key.toLowerCase();
      if (buttons[key]) actions[key][1]();
      else if (stage.key(event)) event.preventDefault();
    });
    const packed = Uint8Array.from(atob($("splats").textContent), (c) => c.charCodeAt(0));
    stage.show(await decodePayload(packed));
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) turn(true);
  } catch (error) {
    fault("This object cannot be shown: " + error.message);
  }
})();
