"use strict";
// 3D Gaussians in WebGL2, with the arithmetic of kernels/rasterize_reference.py: a screen filter in px², opacities
// compensated for it, the same cut-offs. Axes are OpenCV's: x right, y down, z forward; z is up in the world.

const NEAR = 0.01, MAX_ALPHA = 0.999, MIN_ALPHA = 1 / 255, SH0 = 0.28209479177387814;
const SH_C = [
  0.4886025119029199, 1.0925484305920792, 0.31539156525252005, 0.5462742152960396, 0.5900435899266435,
  2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277,
].map((c) => c.toPrecision(9));
// Gaussians in one instance: graphics in software prepare every instance anew, and GPUs fill their lanes better.
const BATCH = 1024;

const VERTEX = `#version 300 es
precision highp float;
precision highp int;
precision highp sampler2D;
precision highp usampler2D;
uniform usampler2D order;           // far to near
uniform sampler2D data, harmonics;  // 4 texels a Gaussian: mean and opacity; the columns of R S, each with a colour
uniform mat3 turn;                  // world to camera
uniform vec3 shift, eye;
uniform vec4 lens;                  // fx fy cx cy in pixels
uniform vec2 size;
uniform float filterSize;           // px²
uniform int count, terms;           // of Gaussians; of the spherical harmonics beyond the first
out vec2 place;
flat out vec4 ink;

int id;

vec3 term(int k) {
  int width = textureSize(harmonics, 0).x, i = id * terms + k;
  return texelFetch(harmonics, ivec2(i % width, i / width), 0).rgb;
}

vec3 beyondFirst(vec3 d) {
  float x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  vec3 c = ${SH_C[0]} * (-y * term(0) + z * term(1) - x * term(2));
  if (terms > 3) {
    c += ${SH_C[1]} * (x * y * term(3) - y * z * term(4) - x * z * term(6));
    c += ${SH_C[2]} * (2. * zz - xx - yy) * term(5) + ${SH_C[3]} * (xx - yy) * term(7);
  }
  if (terms > 8) {
    c += -${SH_C[4]} * y * (3. * xx - yy) * term(8) + ${SH_C[5]} * x * y * z * term(9);
    c += -${SH_C[6]} * (4. * zz - xx - yy) * (y * term(10) + x * term(12));
    c += ${SH_C[7]} * z * (2. * zz - 3. * (xx + yy)) * term(11);
    c += ${SH_C[8]} * z * (xx - yy) * term(13) - ${SH_C[4]} * x * (xx - 3. * yy) * term(14);
  }
  return c;
}

void main() {
  gl_Position = vec4(2., 2., 2., 1.);  // outside: not drawn
  int rank = gl_InstanceID * ${BATCH} + gl_VertexID / 4, wide = textureSize(order, 0).x;
  if (rank >= count) return;
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1 & 1) * 2. - 1.;
  id = int(texelFetch(order, ivec2(rank % wide, rank / wide), 0).r);
  int row = textureSize(data, 0).x / 4;
  ivec2 at = ivec2(id % row * 4, id / row);
  vec4 head = texelFetch(data, at, 0), a = texelFetch(data, at + ivec2(1, 0), 0);
  vec4 b = texelFetch(data, at + ivec2(2, 0), 0), c = texelFetch(data, at + ivec2(3, 0), 0);
  vec3 cam = turn * head.xyz + shift;
  if (cam.z <= ${NEAR}) return;
  vec2 uv = cam.xy / cam.z, margin = 0.15 * size / lens.xy;
  // the linearisation is held at 15 % beyond the image's borders
  vec2 held = clamp(uv, -lens.zw / lens.xy - margin, (size - lens.zw) / lens.xy + margin);
  mat3 shape = transpose(turn * mat3(a.xyz, b.xyz, c.xyz));  // its columns are the rows of what is in front
  vec3 r0 = lens.x / cam.z * (shape[0] - held.x * shape[2]);
  vec3 r1 = lens.y / cam.z * (shape[1] - held.y * shape[2]);
  float xx = dot(r0, r0), xy = dot(r0, r1), yy = dot(r1, r1);
  vec3 area = cross(r0, r1);
  float det0 = dot(area, area), det = max(det0 + filterSize * (xx + yy + filterSize), 1e-10);
  float opacity = head.w * (det0 <= 1e-20 ? 0. : sqrt(det0 / det));
  float reach = 2. * log(max(opacity, 1e-30) / ${MIN_ALPHA});
  if (reach <= 0.) return;
  float half_ = 0.5 * (xx - yy), root = length(vec2(half_, xy)), most = 0.5 * (xx + yy) + filterSize + root;
  vec2 axis = half_ >= 0. ? vec2(half_ + root, xy) : vec2(xy, root - half_);
  axis = root > 0. ? normalize(axis) : vec2(1., 0.);
  place = corner * sqrt(reach);
  vec2 far = place * sqrt(vec2(most, det / most));
  vec2 pixel = lens.xy * uv + lens.zw + far.x * axis + far.y * vec2(-axis.y, axis.x);
  vec3 color = vec3(a.w, b.w, c.w);
  if (terms > 0) color += beyondFirst(normalize(head.xyz - eye));
  ink = vec4(max(color, 0.), opacity);
  gl_Position = vec4(2. * pixel.x / size.x - 1., 1. - 2. * pixel.y / size.y, 0., 1.);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec2 place;
flat in vec4 ink;
out vec4 result;
void main() {
  float alpha = min(${MAX_ALPHA}, ink.a * exp(-0.5 * dot(place, place)));
  if (alpha < ${MIN_ALPHA}) discard;
  result = vec4(ink.rgb * alpha, alpha);
}`;

// ---- the sort, far to near; also the source of the worker, so it uses nothing from outside ----

function sorter() {
  let means, count, depths, buckets, order;
  return {
    load(values) {
      means = values;
      count = means.length / 3;
      depths = new Float32Array(count);
      buckets = new Uint16Array(count);
    },
    sort([x, y, z]) {
      const starts = new Uint32Array(65537);
      let low = Infinity, high = -Infinity;
      for (let i = 0; i < count; i++) {
        const d = (depths[i] = x * means[3 * i] + y * means[3 * i + 1] + z * means[3 * i + 2]);
        if (d < low) low = d;
        if (d > high) high = d;
      }
      const scale = high > low ? 65535 / (high - low) : 0;
      for (let i = 0; i < count; i++) starts[(buckets[i] = ((high - depths[i]) * scale) | 0) + 1]++;
      for (let i = 1; i < 65537; i++) starts[i] += starts[i - 1];
      order = new Uint32Array(count);
      for (let i = 0; i < count; i++) order[starts[buckets[i]]++] = i;
      return order;
    },
  };
}

function startSorting(means) {
  try {
    const source = `const s = (${sorter})();
      onmessage = ({ data }) => {
        if (data.means) return s.load(data.means);
        const order = s.sort(data.row);
        postMessage(order, [order.buffer]);
      };`;
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const worker = new Worker(url);
    worker.postMessage({ means });
    let done = null;
    worker.onmessage = ({ data }) => done(data);
    return {
      sort: (row) => new Promise((resolve) => { done = resolve; worker.postMessage({ row }); }),
      close: () => { worker.terminate(); URL.revokeObjectURL(url); },
    };
  } catch (error) {  // a browser that allows a page from the disk no worker: the page sorts itself
    console.warn("diff2to3: sorting on the page: " + error);
    const own = sorter();
    own.load(means);
    return { sort: async (row) => own.sort(row), close() {} };
  }
}

// ---- the file inside the page: see diff2to3/web/payload.py ----

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function halfToNumber(h) {
  const e = (h >> 10) & 31, m = h & 1023, s = h & 32768 ? -1 : 1;
  return e === 31 ? (m ? NaN : s * Infinity) : s * (e ? 2 ** (e - 15) * (1 + m / 1024) : 2 ** -14 * (m / 1024));
}

// → {count, terms, filter, means [3G], quats [4G] wxyz, logScales [3G], opacities [G], sh [G][1 + terms][3] flat}
async function decodePayload(packed) {
  const bytes = await inflate(packed), view = new DataView(bytes.buffer);
  const magic = String.fromCharCode(...bytes.subarray(0, 4));
  if (magic !== "D2V1") throw new Error("not the data of a diff2to3 viewer");
  const count = view.getUint32(4, true), all = view.getUint32(8, true), planes = view.getUint32(12, true);
  const floats = Array.from({ length: 9 }, (_, i) => view.getFloat32(16 + 4 * i, true));
  const [filter, lowScale, stepScale] = floats.slice(6);
  let at = 52;
  // values of several bytes lie plane by plane, low bytes first: they compress better
  const column = (length) => {
    const out = new Uint32Array(count);
    for (let p = 0; p < length; p++) for (let i = 0; i < count; i++) out[i] |= bytes[at++] << (8 * p);
    return out;
  };
  const g = {
    count, filter, terms: all - 1, means: new Float32Array(3 * count), quats: new Float32Array(4 * count),
    logScales: new Float32Array(3 * count), opacities: new Float32Array(count), sh: new Float32Array(3 * all * count),
  };
  const top = 2 ** (8 * planes) - 1;
  for (let k = 0; k < 3; k++) column(planes).forEach((v, i) => (g.means[3 * i + k] = floats[k] + (v / top) * floats[3 + k]));
  for (let k = 0; k < 3; k++) column(2).forEach((v, i) => (g.logScales[3 * i + k] = lowScale + v * stepScale));
  for (let k = 1; k < 4; k++) column(2).forEach((v, i) => (g.quats[4 * i + k] = v / 32767 - 1));
  for (let i = 0; i < count; i++) {
    const p = g.quats.subarray(4 * i, 4 * i + 4), s = p[1] * p[1] + p[2] * p[2] + p[3] * p[3];
    p[0] = (1 - s) / 2;
    for (let k = 0; k < 4; k++) p[k] *= 2 / (1 + s);
  }
  column(2).forEach((v, i) => (g.opacities[i] = v / 65535));
  for (let k = 0; k < 3 * all; k++) column(2).forEach((v, i) => (g.sh[3 * all * i + k] = halfToNumber(v)));
  return g;
}

// Columns of rotation times scale, [9], of Gaussian i.
function shapeOf(g, i) {
  let [w, x, y, z] = g.quats.subarray(4 * i, 4 * i + 4);
  const n = Math.hypot(w, x, y, z) || 1;
  w /= n; x /= n; y /= n; z /= n;
  const [a, b, c] = g.logScales.subarray(3 * i, 3 * i + 3).map(Math.exp);
  return [
    (1 - 2 * (y * y + z * z)) * a, 2 * (x * y + w * z) * a, 2 * (x * z - w * y) * a,
    2 * (x * y - w * z) * b, (1 - 2 * (x * x + z * z)) * b, 2 * (y * z + w * x) * b,
    2 * (x * z + w * y) * c, 2 * (y * z - w * x) * c, (1 - 2 * (x * x + y * y)) * c,
  ];
}

// ---- drawing ----

class SplatView {
  constructor(canvas) {
    this.canvas = canvas;
    const options = { antialias: false, depth: false, stencil: false, premultipliedAlpha: true, alpha: true };
    const gl = (this.gl = canvas.getContext("webgl2", options));
    if (!gl) throw new Error("this browser has no WebGL2");
    this.program = this.link(VERTEX, FRAGMENT);
    this.at = {};
    for (const name of ["order", "data", "harmonics", "turn", "shift", "eye", "lens", "size", "filterSize", "count", "terms"])
      this.at[name] = gl.getUniformLocation(this.program, name);
    const corners = new Uint16Array(6 * BATCH);
    for (let i = 0; i < BATCH; i++) corners.set([0, 1, 2, 2, 1, 3].map((c) => 4 * i + c), 6 * i);
    gl.bindVertexArray(gl.createVertexArray());
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, corners, gl.STATIC_DRAW);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    this.textures = [];
    this.count = 0;
  }

  link(vertex, fragment) {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) {
      const logs = gl.getAttachedShaders(program).map((s) => gl.getShaderInfoLog(s));
      throw new Error([gl.getProgramInfoLog(program), ...logs].join("\n"));
    }
    return program;
  }

  // A texture for ``count`` items of some texels each, never broken over a row: [texture, width, height].
  texture(unit, format, texelsEach, count) {
    const gl = this.gl, limit = gl.getParameter(gl.MAX_TEXTURE_SIZE), most = Math.min(limit, 4096);
    const width = most - (most % texelsEach), height = Math.max(1, Math.ceil((count * texelsEach) / width));
    if (height > limit) throw new Error(count + " Gaussians are too many for this machine's graphics");
    const texture = gl.createTexture();
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texStorage2D(gl.TEXTURE_2D, 1, format, width, height);
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER])
      gl.texParameteri(gl.TEXTURE_2D, filter, gl.NEAREST);
    this.textures.push(texture);
    return [width, height];
  }

  floats(unit, values, texelsEach, count) {
    const gl = this.gl, [width, height] = this.texture(unit, gl.RGBA32F, texelsEach, count);
    const padded = new Float32Array(4 * width * height);
    padded.set(values);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, width, height, gl.RGBA, gl.FLOAT, padded);
  }

  load(g) {
    const gl = this.gl, all = g.terms + 1, data = new Float32Array(16 * g.count);
    for (let i = 0; i < g.count; i++) {
      const at = 16 * i, shape = shapeOf(g, i);
      data.set(g.means.subarray(3 * i, 3 * i + 3), at);
      data[at + 3] = g.opacities[i];
      for (let k = 0; k < 3; k++) {
        for (let j = 0; j < 3; j++) data[at + 4 + 4 * k + j] = shape[3 * k + j];
        data[at + 7 + 4 * k] = 0.5 + SH0 * g.sh[3 * all * i + k];
      }
    }
    this.textures.splice(0).forEach((t) => gl.deleteTexture(t));
    this.floats(0, data, 4, g.count);
    const rest = new Float32Array(4 * g.terms * g.count);
    for (let i = 0; i < g.count; i++)
      for (let k = 0; k < g.terms; k++) {
        const from = 3 * (all * i + 1 + k);
        rest.set(g.sh.subarray(from, from + 3), 4 * (g.terms * i + k));
      }
    this.floats(1, rest, Math.max(1, g.terms), g.terms ? g.count : 0);
    const [width, height] = this.texture(2, gl.R32UI, 1, g.count);
    this.order = { width, height, padded: new Uint32Array(width * height) };
    this.filter = g.filter;
    this.terms = g.terms;
    this.worker?.close();
    this.worker = startSorting(g.means.slice());
    this.count = 0;  // nothing is drawn before the first sort
    this.total = g.count;
    this.sorted = null;
  }

  // camera: {turn [9] by rows, shift [3], lens [fx, fy, cx, cy]} for a picture as large as the canvas
  draw(camera) {
    const gl = this.gl, { turn: r, shift: t, lens } = camera, { width, height } = this.canvas;
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (!this.count) return;
    gl.useProgram(this.program);
    gl.uniform1i(this.at.data, 0);
    gl.uniform1i(this.at.harmonics, 1);
    gl.uniform1i(this.at.order, 2);
    gl.uniform1i(this.at.count, this.count);
    gl.uniformMatrix3fv(this.at.turn, true, r);
    gl.uniform3fv(this.at.shift, t);
    gl.uniform3fv(this.at.eye, [0, 1, 2].map((k) => -(r[k] * t[0] + r[3 + k] * t[1] + r[6 + k] * t[2])));
    gl.uniform4fv(this.at.lens, lens);
    gl.uniform2f(this.at.size, width, height);
    gl.uniform1f(this.at.filterSize, this.filter);
    gl.uniform1i(this.at.terms, this.terms);
    gl.drawElementsInstanced(gl.TRIANGLES, 6 * BATCH, gl.UNSIGNED_SHORT, 0, Math.ceil(this.count / BATCH));
  }

  // Give the graphics memory back; nothing is drawn afterwards.
  close() {
    this.worker?.close();
    this.count = 0;
    this.gl.getExtension("WEBGL_lose_context")?.loseContext();
  }

  // Sort for a camera unless that is what was sorted for last; one sort at a time. True if the order is new.
  async sort(camera) {
    const row = camera.turn.slice(6);
    while (this.sorting) await this.sorting;
    if (this.sorted && row.every((v, k) => Math.abs(v - this.sorted[k]) < 1e-6)) return false;
    const worker = this.worker;
    this.sorting = worker.sort(row);
    const order = await this.sorting;
    this.sorting = null;
    if (worker !== this.worker) return false;
    const gl = this.gl, { width, height, padded } = this.order;
    padded.set(order);
    gl.activeTexture(gl.TEXTURE2);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, width, height, gl.RED_INTEGER, gl.UNSIGNED_INT, padded);
    this.count = this.total;
    this.sorted = row;
    return true;
  }
}
