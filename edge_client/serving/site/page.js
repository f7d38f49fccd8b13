"use strict";
// The models come from page/models; answers come from v2/models/NAME/infer, as for any client.

const $ = (id) => document.getElementById(id);
// What is on the canvas: nothing, an example's own numbers, or what a person drew.
let models = [], model = null, drawn = false, exact = null;

const count = (shape) => shape.reduce((product, size) => product * size, 1);

// A picture is a square of numbers, flat or with one channel.
function side(shape) {
  const sizes = shape.filter((size) => size !== 1);
  const length = sizes.length === 2 && sizes[0] === sizes[1] ? sizes[0] : Math.sqrt(count(shape));
  return sizes.length <= 2 && Number.isInteger(length) && length >= 8 && length <= 64 ? length : 0;
}

function rowShape() { return model.inputs[0].shape.slice(1); }

function canDraw() {
  return model.inputs.length === 1 && model.presents === "label" && side(rowShape()) > 0;
}

function show() {
  model = models.find((one) => one.name === $("model").value);
  $("draw").hidden = !canDraw();
  $("paste").hidden = canDraw();
  $("about").textContent =
    `Version ${model.version}, ${model.kind}. ` +
    model.inputs.map((one) => `${one.name}: ${one.datatype} [${one.shape.join(", ")}]`).join("; ");
  $("what").textContent = model.inputs.length > 1
    ? "An object with one list of numbers for each input, as JSON"
    : "One input: numbers, separated by commas or as JSON";
  clear();
}

function clear() {
  const pen = $("canvas").getContext("2d");
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, 280, 280);
  drawn = false;
  exact = null;
  $("text").value = "";
  say("No answer yet.");
}

function say(text, wrong = false) {
  $("answer").textContent = text;
  $("answer").classList.toggle("wrong", wrong);
  $("bars").replaceChildren();
  $("took").textContent = "";
}

// Scales the drawing to the model's size, centred by mass as handwritten digits are.
function pixels() {
  if (exact) return exact;
  const size = side(rowShape()), canvas = $("canvas");
  const from = canvas.getContext("2d").getImageData(0, 0, 280, 280).data;
  let left = 280, right = 0, top = 280, bottom = 0, mass = 0, x = 0, y = 0;
  for (let row = 0; row < 280; row++) for (let column = 0; column < 280; column++) {
    const value = from[4 * (280 * row + column)];
    if (value < 32) continue;
    left = Math.min(left, column); right = Math.max(right, column);
    top = Math.min(top, row); bottom = Math.max(bottom, row);
    mass += value; x += value * column; y += value * row;
  }
  const small = document.createElement("canvas");
  small.width = small.height = size;
  const pen = small.getContext("2d", { willReadFrequently: true });
  pen.fillRect(0, 0, size, size);
  if (mass > 0) {
    const scale = (size < 16 ? size : size * 20 / 28) / Math.max(right - left, bottom - top, 1);
    pen.imageSmoothingQuality = "high";
    pen.setTransform(scale, 0, 0, scale, size / 2 - scale * x / mass, size / 2 - scale * y / mass);
    pen.drawImage(canvas, 0, 0);
  }
  const data = pen.getImageData(0, 0, size, size).data;
  const most = model.input_max || 1;
  return Array.from({ length: size * size }, (_, place) => data[4 * place] / 255 * most);
}

function paint(values) {
  const size = side(rowShape()), small = document.createElement("canvas");
  small.width = small.height = size;
  const pen = small.getContext("2d"), image = pen.createImageData(size, size);
  values.forEach((value, place) => {
    const shade = Math.max(0, Math.min(255, 255 * value / (model.input_max || 1)));
    image.data.set([shade, shade, shade, 255], 4 * place);
  });
  pen.putImageData(image, 0, 0);
  const wide = $("canvas").getContext("2d");
  wide.imageSmoothingEnabled = false;  // the pixels that the model sees
  wide.drawImage(small, 0, 0, 280, 280);
  drawn = true;
  exact = values;
}

function flat(value) { return Array.isArray(value) ? value.flatMap(flat) : [value]; }

function rows() {
  if (canDraw()) {
    if (!drawn) throw new Error("Draw something first.");
    return { [model.inputs[0].name]: pixels() };
  }
  const text = $("text").value.trim();
  if (!text) throw new Error("Enter an input first.");
  if (model.inputs.length > 1) return JSON.parse(text);
  const json = /^\[/.test(text) ? text : `[${text}]`;
  return { [model.inputs[0].name]: JSON.parse(json) };
}

function tensors(values) {
  return model.inputs.map((one) => {
    const data = flat(values[one.name] ?? []), shape = [1, ...one.shape.slice(1)];
    const open = shape.indexOf(-1);
    if (open >= 0) shape[open] = Math.max(1, data.length / Math.abs(count(shape)));
    return { name: one.name, datatype: one.datatype, shape, data };
  });
}

// Numbers are sent as they are; whether they fit is for the server to say.
async function ask() {
  let body;
  try {
    body = JSON.stringify({ inputs: tensors(rows()) });
  } catch (error) {
    say(error.message, true);
    return;
  }
  const began = performance.now();
  try {
    const response = await fetch(`v2/models/${model.name}/infer`, { method: "POST", body });
    const answer = await response.json();
    if (!response.ok) { say(answer.error, true); return; }
    tell(answer);
    $("took").textContent =
      `Version ${answer.model_version}, ${(performance.now() - began).toFixed(1)} ms with the way there and back.`;
  } catch (error) {
    say(`The server did not answer: ${error.message}`, true);
  }
}

function softmax(logits) {
  const most = Math.max(...logits), powers = logits.map((one) => Math.exp(one - most));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((one) => one / sum);
}

function tell(answer) {
  if (model.outputs.length) {
    say(model.outputs.map((one) => `${one.name}: ${short(one, answer)}`).join("; "));
    return;
  }
  const { data, shape } = answer.outputs[0];
  const logistic = (value) => 1 / (1 + Math.exp(-value));
  const named = (place) => model.labels[place] ?? String(place);
  if (model.presents === "label" && shape.length === 2 && shape[1] > 1) {
    chart(softmax(data).map((share, place) => [named(place), share]), false);
  } else if (model.presents === "binary" && data.length === 1) {
    const share = logistic(data[0]);
    chart([[named(1), share], [named(0), 1 - share]], false);
  } else if (model.presents === "labels") {
    chart(data.map((value, place) => [named(place), logistic(value)]), true);
  } else {
    say(numbers(data));
  }
}

function numbers(data) {
  const first = data.slice(0, 200).map((value) => Number(value.toPrecision(6))).join(", ");
  return data.length > 200 ? `${first}, and ${data.length - 200} more` : first;
}

// One of several outputs as text: its class, its labels, or its numbers.
function short({ name, presents, labels }, answer) {
  const { data, shape } = answer.outputs.find((one) => one.name === name);
  const named = (place) => labels[place] ?? String(place);
  if (presents === "label" && shape.length === 2) return named(data.indexOf(Math.max(...data)));
  if (presents === "binary" && data.length === 1) return named(data[0] > 0 ? 1 : 0);
  if (presents === "labels") {
    return data.flatMap((value, place) => (value > 0 ? [named(place)] : [])).join(", ") || "none";
  }
  return numbers(data);
}

function chart(shares, several) {
  const sorted = [...shares].sort(([, one], [, other]) => other - one);
  const chosen = several ? sorted.filter(([, share]) => share > 0.5).map(([name]) => name) : [sorted[0][0]];
  say(chosen.join(", ") || "none of the labels");
  $("bars").replaceChildren(...sorted.slice(0, 10).map(([name, share]) => {
    const line = document.createElement("li"), meter = document.createElement("meter");
    const label = document.createElement("span"), figure = document.createElement("span");
    label.textContent = name;
    meter.value = share;
    meter.setAttribute("aria-label", name);
    figure.textContent = `${(100 * share).toFixed(1)} %`;
    line.append(label, meter, figure);
    return line;
  }));
}

function drawing() {
  const canvas = $("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * 280 / box.width, (event.clientY - box.top) * 280 / box.height];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pen.strokeStyle = "#fff"; pen.lineWidth = 22; pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...at(event));
    pen.lineTo(...at(event));
    pen.stroke();
    drawn = true;
    exact = null;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!event.buttons) return;
    pen.lineTo(...at(event));
    pen.stroke();
  });
  canvas.addEventListener("pointerup", ask);
}

function example() {
  clear();
  if (!model.example) { say("This release has no input for its self-test that can be shown.", true); return; }
  if (canDraw()) paint(flat(model.example[model.inputs[0].name]));
  else $("text").value = JSON.stringify(
    model.inputs.length > 1 ? model.example : model.example[model.inputs[0].name]);
  ask();
}

async function start() {
  drawing();
  $("ask").addEventListener("click", ask);
  $("clear").addEventListener("click", clear);
  $("example").addEventListener("click", example);
  $("model").addEventListener("change", show);
  models = await (await fetch("page/models")).json();
  if (!models.length) { say("No model is served.", true); return; }
  $("model").replaceChildren(...models.map((one) => new Option(one.name, one.name)));
  show();
  if (location.hash === "#example") example();  // a link to an answer
}

start();
