"use strict";
// A camera that turns around a point, moved by mouse, touch and keys, and a stage that draws what it sees.

const RAD = Math.PI / 180, clamp = (x, low, high) => Math.min(high, Math.max(low, x));

// {azimuth, elevation (degrees), distance, fov (degrees, across the shorter side), target [3]} → camera of SplatView
function cameraOf(o, width, height) {
  const a = o.azimuth * RAD, e = o.elevation * RAD, ce = Math.cos(e), se = Math.sin(e), ca = Math.cos(a), sa = Math.sin(a);
  const forward = [-ce * ca, -ce * sa, -se], right = [-sa, ca, 0], down = [se * ca, se * sa, -ce];
  const eye = o.target.map((v, k) => v - o.distance * forward[k]);
  const rows = [right, down, forward], focal = Math.min(width, height) / 2 / Math.tan((o.fov * RAD) / 2);
  const shift = rows.map((r) => -(r[0] * eye[0] + r[1] * eye[1] + r[2] * eye[2]));
  return { turn: rows.flat(), shift, lens: [focal, focal, width / 2, height / 2] };
}

class Stage {
  // home: where the camera starts; onFault(message): what could not be drawn
  constructor(canvas, home, onFault) {
    this.canvas = canvas;
    this.onFault = onFault;
    this.view = new SplatView(canvas);
    this.home = { azimuth: -90, elevation: 10, distance: 2, fov: 40, target: [0, 0, 0], ...home };
    this.turntable = false;
    this.detail = 1;  // share of the canvas' pixels a side while moving, so that slow machines keep up
    this.linked = [];
    this.reset();
    this.listen();
    new ResizeObserver(() => this.touch()).observe(canvas);
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault();
      if (canvas.isConnected) onFault("The graphics system stopped the page. Reload it.");
    });
  }

  reset() {
    this.orbit = { ...this.home, target: [...this.home.target] };
    this.touch();
  }

  show(gaussians) {
    this.view.load(gaussians);
    this.gaussians = gaussians;
    this.touch();
  }

  // Something changed: draw soon, coarsely while it keeps changing and finely once it rests.
  touch(moving = false) {
    if (moving) this.movedAt = performance.now();
    for (const other of this.linked) {
      Object.assign(other.orbit, { ...this.orbit, target: [...this.orbit.target] });
      if (moving) other.movedAt = this.movedAt;
      other.request();
    }
    this.request();
  }

  request() {
    if (!this.pending) this.pending = requestAnimationFrame((now) => this.frame(now));
  }

  async frame(now) {
    const before = this.frameAt ?? now, moving = this.turntable || now - (this.movedAt ?? -1e9) < 200;
    this.frameAt = now;
    if (this.turntable) {
      this.orbit.azimuth += Math.min(now - before, 100) * 0.03;
      for (const other of this.linked) {
        other.orbit.azimuth = this.orbit.azimuth;
        other.movedAt = now;
        other.request();
      }
    }
    if (moving && this.wasMoving) this.adapt(now - before);
    this.wasMoving = moving;
    const camera = this.fit(moving ? this.detail : 1);
    this.pending = 0;
    if (!this.gaussians || !this.canvas.clientWidth) return;
    this.view.draw(camera);
    this.frames = (this.frames ?? 0) + 1;
    if (this.view.count) this.canvas.dataset.drawn = "";  // for style sheets, and for tests
    // a sort that is under way asks for a frame when it ends, which sorts for the camera of that moment
    if (!this.view.sorting)
      this.view.sort(camera).then((fresh) => fresh && this.request(), (error) => this.onFault(String(error)));
    if (moving) this.request();
  }

  // Below 20 frames a second fewer pixels, above 45 more of them.
  adapt(milliseconds) {
    if (milliseconds > 50) this.detail = Math.max(0.25, this.detail * 0.8);
    else if (milliseconds < 22) this.detail = Math.min(1, this.detail * 1.05);
  }

  // The canvas' pixels for its size on the screen; returns the camera.
  fit(detail) {
    const scale = Math.min(devicePixelRatio || 1, 2) * detail, c = this.canvas;
    const width = Math.max(1, Math.round(c.clientWidth * scale)), height = Math.max(1, Math.round(c.clientHeight * scale));
    if (c.width !== width || c.height !== height) Object.assign(c, { width, height });
    return cameraOf(this.orbit, width, height);
  }

  // A PNG (Blob) over a CSS colour, or over nothing. Size and camera are the screen's unless given.
  async picture({ width, height, camera, background } = {}) {
    const c = this.canvas, seen = this.fit(1);
    if (width) Object.assign(c, { width, height });
    const used = camera ?? (width ? cameraOf(this.orbit, width, height) : seen);
    await this.view.sort(used);
    Object.assign(c, { width: width ?? c.width, height: height ?? c.height });  // a frame may have come between
    this.view.draw(used);
    const copy = Object.assign(document.createElement("canvas"), { width: c.width, height: c.height });
    const context = copy.getContext("2d");
    if (background) {
      context.fillStyle = background;
      context.fillRect(0, 0, copy.width, copy.height);
    }
    context.drawImage(c, 0, 0);
    this.request();
    return new Promise((resolve) => copy.toBlob(resolve, "image/png"));
  }

  rotate(dx, dy) {
    this.orbit.azimuth -= dx;
    this.orbit.elevation = clamp(this.orbit.elevation + dy, -89.9, 89.9);
    this.touch(true);
  }

  zoom(factor) {
    const o = this.orbit;
    o.distance = clamp(o.distance * factor, this.home.distance / 50, this.home.distance * 20);
    this.touch(true);
  }

  // By pixels of the screen.
  pan(dx, dy) {
    const o = this.orbit, { turn } = cameraOf(o, 1, 1);
    const step = (2 * o.distance * Math.tan((o.fov * RAD) / 2)) / Math.min(this.canvas.clientWidth, this.canvas.clientHeight);
    for (let k = 0; k < 3; k++) o.target[k] -= step * (dx * turn[k] + dy * turn[3 + k]);
    this.touch(true);
  }

  listen() {
    const c = this.canvas, fingers = new Map();
    c.style.touchAction = "none";
    c.addEventListener("contextmenu", (event) => event.preventDefault());
    c.addEventListener("dblclick", () => this.reset());
    c.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(clamp(event.deltaY * (event.deltaMode ? 30 : 1), -300, 300) * 0.0015));
    }, { passive: false });
    c.addEventListener("pointerdown", (event) => {
      c.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, [event.clientX, event.clientY]);
      this.turntable = false;
      c.dispatchEvent(new Event("stopped"));
    });
    c.addEventListener("pointermove", (event) => {
      const old = fingers.get(event.pointerId);
      if (!old) return;
      const now = [event.clientX, event.clientY], dx = now[0] - old[0], dy = now[1] - old[1];
      if (fingers.size === 2) {
        const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
        const span = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
        this.zoom(span(old) / span(now));
        this.pan(dx / 2, dy / 2);
      } else if (event.buttons & 6 || event.shiftKey) this.pan(dx, dy);
      else this.rotate(dx * 0.35, dy * 0.35);
      fingers.set(event.pointerId, now);
    });
    for (const kind of ["pointerup", "pointercancel"]) c.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  }

  // True if the key means something here.
  key(event) {
    const step = event.shiftKey ? 15 : 5;
    const actions = {
      ArrowLeft: () => this.rotate(step, 0), ArrowRight: () => this.rotate(-step, 0),
      ArrowUp: () => this.rotate(0, step), ArrowDown: () => this.rotate(0, -step),
      "+": () => this.zoom(0.9), "=": () => this.zoom(0.9), "-": () => this.zoom(1 / 0.9),
    };
    actions[event.key]?.();
    return event.key in actions;
  }
}

// ---- a .ply of what is shown, as 3DGS programs expect it: y down, (x, −z, y). Harmonics beyond the first would have to
// turn too, so objects that have them stay z up; "frame" says which it is. ----

function plyOf(g, note) {
  const all = g.terms + 1, down = all === 1, half = Math.SQRT1_2, rest = Array.from({ length: 3 * g.terms }, (_, i) => "f_rest_" + i);
  const names = [
    "x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", ...rest, "opacity", "scale_0", "scale_1", "scale_2",
    "rot_0", "rot_1", "rot_2", "rot_3",
  ];
  const head = ["ply", "format binary_little_endian 1.0", "comment diff2to3 " + JSON.stringify(down ? { ...note, frame: "right-handed, y down" } : note),
    "element vertex " + g.count, ...names.map((n) => "property float " + n), "end_header", ""].join("\n");
  const table = new Float32Array(names.length * g.count);
  let at = 0;
  for (let i = 0; i < g.count; i++) {
    const sh = g.sh.subarray(3 * all * i, 3 * all * (i + 1)), opacity = clamp(g.opacities[i], 1e-6, 1 - 1e-6);
    const [x, y, z] = g.means.subarray(3 * i, 3 * i + 3), [a, b, c, d] = g.quats.subarray(4 * i, 4 * i + 4);
    for (const v of down ? [x, -z, y] : [x, y, z]) table[at++] = v;
    for (let k = 0; k < 3; k++) table[at++] = sh[k];
    for (let n = 0; n < 3; n++) for (let k = 1; k < all; k++) table[at++] = sh[3 * k + n];
    table[at++] = Math.log(opacity / (1 - opacity));
    for (let k = 0; k < 3; k++) table[at++] = g.logScales[3 * i + k];
    for (const v of down ? [a - b, a + b, c - d, c + d].map((v) => half * v) : [a, b, c, d]) table[at++] = v;
  }
  return new Blob([head, table], { type: "application/octet-stream" });
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
