"use strict";
// The photo over squares where it is background; a brush changes which part is the object.

class CutOut {
  // onEdit(): the mask was changed by hand
  constructor(canvas, onEdit) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onEdit = onEdit;
    this.keeping = true;
    this.brush = 40;
    this.past = [];
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.photo || event.button) return;
      canvas.setPointerCapture(event.pointerId);
      this.remember();
      this.last = this.point(event);
      this.stroke(this.last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.last) return;
      for (const e of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) this.stroke(this.point(e));
    });
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (this.last = null));
  }

  // photo: an image; mask: an image whose grey is how much of a pixel is object
  show(photo, mask) {
    const size = { width: photo.width, height: photo.height };
    Object.assign(this.canvas, size);
    this.photo = photo;
    this.mask = Object.assign(document.createElement("canvas"), size);  // white, with the mask as its alpha
    this.layer = Object.assign(document.createElement("canvas"), size);
    const context = this.mask.getContext("2d", { willReadFrequently: true });
    context.drawImage(mask, 0, 0);
    const pixels = context.getImageData(0, 0, size.width, size.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data[i + 3] = pixels.data[i];
      pixels.data.fill(255, i, i + 3);
    }
    context.putImageData(pixels, 0, 0);
    this.past = [];
    this.draw();
  }

  // The screen's pixels to the photo's: the canvas is fitted into its box.
  point(event) {
    const box = this.canvas.getBoundingClientRect(), c = this.canvas;
    const scale = Math.max(c.width / box.width, c.height / box.height);
    return [
      (event.clientX - box.left - box.width / 2) * scale + c.width / 2,
      (event.clientY - box.top - box.height / 2) * scale + c.height / 2,
      scale,
    ];
  }

  stroke(to) {
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = this.keeping ? "source-over" : "destination-out";
    context.strokeStyle = "#fff";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = this.brush * to[2];
    context.beginPath();
    context.moveTo(this.last[0], this.last[1]);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    this.last = to;
    this.changed();
  }

  remember() {
    this.past.push(this.mask.getContext("2d").getImageData(0, 0, this.mask.width, this.mask.height));
    if (this.past.length > 12) this.past.shift();
  }

  undo() {
    if (this.past.length) this.mask.getContext("2d").putImageData(this.past.pop(), 0, 0);
    this.changed();
  }

  all() {
    this.remember();
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, this.mask.width, this.mask.height);
    this.changed();
  }

  changed() {
    this.draw();
    this.onEdit();
  }

  draw() {
    const { width, height } = this.canvas, layer = this.layer.getContext("2d"), context = this.context;
    layer.globalCompositeOperation = "copy";
    layer.drawImage(this.mask, 0, 0);
    layer.globalCompositeOperation = "source-in";
    layer.drawImage(this.photo, 0, 0);
    context.clearRect(0, 0, width, height);
    context.globalAlpha = 0.22;  // what was removed stays to be seen, so that it can be brought back
    context.drawImage(this.photo, 0, 0);
    context.globalAlpha = 1;
    context.drawImage(this.layer, 0, 0);
  }

  // The mask as a PNG, white on black.
  png() {
    const { width, height } = this.mask, copy = Object.assign(document.createElement("canvas"), { width, height });
    const context = copy.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.drawImage(this.mask, 0, 0);
    return new Promise((resolve) => copy.toBlob(resolve, "image/png"));
  }
}
