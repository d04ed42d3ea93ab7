"use strict";
// The web app: a photo goes up, its cut-out is corrected, a job is followed step by step, results turn side by side.

const $ = (id) => document.getElementById(id), pause = (ms) => new Promise((done) => setTimeout(done, ms));
const STAGES = { photo: [0, 0.02, "Reading the photo"], structure: [0.02, 0.45, "Shape"], latents: [0.45, 1, "Surface and colour"] };
const MAX_STAGES = 8;  // canvases with 3D graphics: browsers end the oldest of more than 16
const app = (window.app = { photo: null, edited: false, job: null, stages: [], info: null });

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(method, path, body) {
  const headers = typeof body === "string" ? { "Content-Type": "application/json" } : {};
  const answer = await fetch(path, { method, body, headers });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Refused(said.error || "the server said " + answer.status, answer.status);
}

const fault = (message) => ($("fault").textContent = message ?? "");
const explain = (error) => fault(error instanceof Refused ? error.message : "The server does not answer. Is it running?");

// ---- the photo and its cut-out ----

const cutOut = new CutOut($("cut"), () => {
  app.edited = true;
  $("undo").disabled = !cutOut.past.length;
});

async function takePhoto(file) {
  fault();
  if (app.info && file.size > app.info.upload_bytes)
    return fault("This file is larger than " + Math.round(app.info.upload_bytes / 1e6) + " MB.");
  $("drop").lastElementChild.textContent = "Cutting the object out…";
  try {
    const photo = await (await call("POST", "/api/photos", file)).json();
    const image = async (part) => createImageBitmap(await (await call("GET", `/api/photos/${photo.id}/${part}`)).blob());
    const [picture, mask] = await Promise.all([image("picture"), image("mask")]);
    Object.assign(app, { photo: { ...photo, file }, edited: false });
    cutOut.show(picture, mask);
    $("undo").disabled = true;
    $("notes").textContent = photo.notes.length ? photo.notes.join("; ") + ". Correct the cut-out with the brush." : "";
    $("editor").hidden = false;
  } catch (error) {
    explain(error);
  }
  $("drop").lastElementChild.textContent = "Another photo";
  $("drop").classList.add("small");
}

// A server that was started anew does not know the photo: it is sent again.
async function sendAgain() {
  const photo = await (await call("POST", "/api/photos", app.photo.file)).json();
  Object.assign(app, { photo: { ...app.photo, id: photo.id }, edited: true });
}

// ---- jobs ----

async function start() {
  fault();
  if ($("seed").value === "" || !$("seed").reportValidity() || !$("steps").reportValidity()) return;
  const first = Number($("seed").value), seeds = Array.from({ length: Number($("variants").value) }, (_, i) => first + i);
  const request = async () => {
    if (app.edited) {
      await call("POST", `/api/photos/${app.photo.id}/mask`, await cutOut.png());
      app.edited = false;
    }
    const steps = $("steps").value === "" ? null : Number($("steps").value);
    return (await call("POST", "/api/jobs", JSON.stringify({ photo: app.photo.id, seeds, steps }))).json();
  };
  busy(true);
  try {
    let job;
    try {
      job = await request();
    } catch (error) {
      if (!(error instanceof Refused && /does not know/.test(error.message))) throw error;
      await sendAgain();
      job = await request();
    }
    app.job = job.id;
    await follow(job);
  } catch (error) {
    explain(error);
  }
  app.job = null;
  busy(false);
}

function busy(on) {
  $("go").disabled = on;
  $("cancel").hidden = $("progress").hidden = !on;
  if (on) tell(0, "Sending");
}

function tell(share, text) {
  $("progress").querySelector("progress").value = share;
  $("stage").textContent = text;
}

async function follow(job) {
  const row = Object.assign(document.createElement("div"), { className: "grid" }), shown = [];
  while (true) {
    for (; shown.length < job.results.length; ) {
      if (!shown.length) {
        $("empty").hidden = true;
        $("results").prepend(row);
      }
      const number = shown.length;
      shown.push(await addResult(row, shown, job, number, job.results[number]));
    }
    if (job.state === "done") return;
    if (job.state === "cancelled") return fault("Cancelled.");
    if (job.state === "failed") return fault(job.error);
    if (job.state === "queued") tell(0, job.ahead === 1 ? "One job is before yours" : job.ahead + " jobs are before yours");
    else {
      const [low, high, name] = STAGES[job.stage] ?? [0, 0, "Starting"], share = job.steps ? job.step / job.steps : 0;
      const which = job.seeds.length > 1 ? `Variant ${Math.min(job.results.length + 1, job.seeds.length)} of ${job.seeds.length}: ` : "";
      tell((job.results.length + low + share * (high - low)) / job.seeds.length,
        which + name + (job.steps > 1 ? `, step ${job.step} of ${job.steps}` : ""));
    }
    await pause(250);
    job = await poll(job);
  }
}

// The job as it stands; waits while the server does not answer.
async function poll(job) {
  for (let tries = 0; ; tries++) {
    try {
      const now = await (await call("GET", "/api/jobs/" + job.id)).json();
      if (tries) fault();
      return now;
    } catch (error) {
      if (error instanceof Refused && error.status === 404)
        throw new Refused("The server was started anew, and the job is lost. Press Make 3D again.", 404);
      if (error instanceof Refused || tries > 40) throw error;
      fault("The server does not answer. Trying again…");
      await pause(1000);
    }
  }
}

// ---- results ----

async function addResult(row, siblings, job, number, result) {
  const base = `/api/jobs/${job.id}/${number}/`;
  const packed = await (await call("GET", base + "splats")).arrayBuffer();
  const card = Object.assign(document.createElement("div"), { className: "card" });
  const canvas = document.createElement("canvas"), about = document.createElement("div"), files = document.createElement("div");
  canvas.tabIndex = 0;
  canvas.setAttribute("aria-label", "Result of seed " + result.seed + "; drag to turn it");
  about.textContent = `Seed ${result.seed} · ${result.gaussians.toLocaleString("en")} Gaussians · ${result.seconds} s`;
  about.title = result.notes.join("; ");
  files.className = "files";
  for (const { ending, label } of app.info.formats)
    files.append(Object.assign(document.createElement("a"), { href: base + ending, download: "", textContent: "." + ending, title: label }));
  card.append(canvas, about, files);
  row.append(card);
  const stage = new Stage(canvas, result.home, fault);
  stage.show(await decodePayload(packed));
  canvas.addEventListener("stopped", () => app.stages.forEach((s) => (s.turntable = false)));
  canvas.addEventListener("keydown", (event) => stage.key(event) && event.preventDefault());
  // the variants of one photo turn together
  for (const other of siblings) {
    other.linked.push(stage);
    stage.linked.push(other);
  }
  if (siblings.length) Object.assign(stage.orbit, { ...siblings[0].orbit, target: [...siblings[0].orbit.target] });
  else if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
    app.stages.forEach((s) => (s.turntable = false));
    stage.turntable = true;
  }
  app.stages.push(stage);
  while (app.stages.length > MAX_STAGES) {
    const old = app.stages.shift();
    old.view.close();
    old.canvas.closest(".card").remove();
    app.stages.forEach((s) => (s.linked = s.linked.filter((o) => o !== old)));
  }
  return stage;
}

// ---- wiring ----

$("file").addEventListener("change", (event) => event.target.files[0] && takePhoto(event.target.files[0]));
addEventListener("paste", (event) => event.clipboardData?.files[0] && takePhoto(event.clipboardData.files[0]));
for (const kind of ["dragover", "drop", "dragleave"])
  addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) takePhoto(event.dataTransfer.files[0]);
  });
for (const id of ["keep", "remove"])
  $(id).onclick = () => {
    cutOut.keeping = id === "keep";
    $("keep").setAttribute("aria-pressed", cutOut.keeping);
    $("remove").setAttribute("aria-pressed", !cutOut.keeping);
  };
$("brush").oninput = (event) => (cutOut.brush = Number(event.target.value));
$("undo").onclick = () => cutOut.undo();
$("all").onclick = () => cutOut.all();
$("go").onclick = start;
$("cancel").onclick = () => app.job && call("DELETE", "/api/jobs/" + app.job).catch(explain);

(async () => {
  try {
    app.info = await (await call("GET", "/api/info")).json();
    $("model").textContent = "model: " + app.info.model;
    $("steps").placeholder = [...new Set(app.info.steps)].join(" + ");
  } catch (error) {
    explain(error);
  }
})();
