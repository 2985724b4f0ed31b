// The page: what is shown, and what follows from pointing, keys and choices.

const MAPS = ["none", "length", "direction", "mask"];
const ZOOMS = [1, 4, 16], LEAST_SHOWN = 8;  // the least shown of the image, in pixels
const MOST_LEVELS = 3, MOST_SAMPLES = 20000, MOST_NAMED = 6;
/** Radii of the dots of a level, on the screen: of the last level shown, and of those before. */
const RADII = [6, 4, 2.9];
const MARK = 3.5;  // half the side of a place of the regular grid, on the screen

const data = JSON.parse(document.getElementById("data").textContent);
const size = [data.height, data.width];
const layers = data.layers.map((layer) => new Layer(layer));
const margin = Math.max(1, 0.06 * Math.max(...size));
/** What is shown without zoom: x, y, width, height, in pixels of the image. */
const box = [-margin, -margin, size[1] + 2 * margin, size[0] + 2 * margin];

const state = {
  layer: layers.length - 1,
  /** Where the user pointed, [h, w] in pixels of the image; kept when the layer changes. */
  place: size.map((extent) => (extent - 1) / 2),
  position: [0, 0],
  count: 1,
  map: "none",
  zoom: 1,
  groups: layers.map(() => 0),
  held: false,
};

const $ = (id) => document.getElementById(id);

// --- The image and what is drawn on it ---

const backdrop = shape("rect", {
  x: box[0], y: box[1], width: box[2], height: box[3], class: "backdrop",
});
const picture = shape("image", {
  x: 0, y: 0, width: size[1], height: size[0], href: data.picture, preserveAspectRatio: "none",
  class: "picture",
});
const frame = shape("rect", {x: 0, y: 0, width: size[1], height: size[0], class: "frame"});
const map = shape("image", {preserveAspectRatio: "none", class: "map"});
const drawing = shape("g", {class: "drawing"});
const svg = shape("svg", {viewBox: box.join(" "), "aria-hidden": "true"},
  backdrop, picture, map, frame, drawing);
$("stage").append(svg);
$("stage").style.aspectRatio = `${box[2]} / ${box[3]}`;
document.documentElement.style.setProperty("--shape", box[2] / box[3]);

/** What is shown, as `box`. */
let view = box;

/** Pixels of the image for one of the screen. */
const pixel = () => view[2] / ($("stage").clientWidth || 600);

/** Shows as much of the plane as the zoom does, around a place [h, w], and nothing beyond. */
function look(place) {
  const extent = [box[2] / state.zoom, box[3] / state.zoom];
  const start = extent.map((length, i) => clamped(
    place[1 - i] + 0.5 - length / 2, box[i], box[i] + box[i + 2] - length));
  view = [...start, ...extent];
  svg.setAttribute("viewBox", view.join(" "));
}

/** Whether a place [h, w] is within the middle of what is shown. */
function inSight(place) {
  return [0, 1].every((i) => Math.abs((place[1 - i] + 0.5 - view[i]) / view[i + 2] - 0.5) < 0.35);
}

/** The longest offset that has a colour of its own, in pixels of the image. */
function longest() {
  return Math.max(...chain(layers, state.layer, state.count).map(
    (index) => layers[index].top * Math.max(...layers[index].scale)));
}

/** How much of a mask's range, from 0 to 1. Without a mask, all of it. */
function weight(layer, mask) {
  if (mask === null) return 1;
  const most = Math.max(...layer.maskRange.map(Math.abs));
  return Number.isNaN(mask) ? 0 : clamped(Math.abs(mask) / most, 0, 1);
}

/** Where a sample is drawn, [y, x]: there, or where the way from the grid leaves the box. */
function drawn(sample, radius) {
  const [from, to] = [sample.regularPixel, sample.pixel].map(
    (place) => place.map((along) => along + 0.5));
  const least = [box[1] + radius, box[0] + radius];
  const most = [box[1] + box[3] - radius, box[0] + box[2] - radius];
  const reach = Math.min(1, ...[0, 1].map((axis) => {
    const way = to[axis] - from[axis];
    return way === 0 ? 1 : Math.max(0, ((way > 0 ? most : least)[axis] - from[axis]) / way);
  }));
  return [0, 1].map(
    (axis) => clamped(from[axis] + reach * (to[axis] - from[axis]), least[axis], most[axis]));
}

function dot(layer, sample, level, last, unit, top) {
  const radius = RADII[level] * unit * clamped(view[2] / unit / 600, 0.65, 1);
  const part = weight(layer, sample.mask);
  const [y, x] = sample.reads ? sample.pixel.map((along) => along + 0.5) : drawn(sample, radius);
  const kind = !sample.reads ? "outside" : last ? "last" : "before";
  const reach = sample.length / top, paint = css(colour(reach));
  return shape("circle", {
    cx: x, cy: y, r: radius * (0.35 + 0.65 * Math.sqrt(part)),
    class: `sample ${kind}`, "data-level": level + 1,
    ...(kind === "last" ? {
      fill: paint, "fill-opacity": 0.3 + 0.7 * part, stroke: reach < 0.5 ? "white" : "black",
    } : {}),
    ...(kind === "before" ? {stroke: paint} : {}),
  });
}

/** The output position's window, the regular grid in it, and lines to its samples. */
function gridOf(layer, samples, unit) {
  const middle = layer.middle(state.position);
  const spacing = Math.min(...layer.dilation.map((step, axis) => step * layer.scale[axis]));
  const half = Math.min(MARK * unit, 0.35 * spacing);
  const cell = layer.strides.map((stride, axis) => stride * layer.scale[axis]);
  const drawable = samples.filter((sample) => sample.pixel.every(Number.isFinite));
  const lines = drawable.map((sample) => {
    const [fromY, fromX] = sample.regularPixel, [toY, toX] = drawn(sample, 0);
    return `M${fromX + 0.5} ${fromY + 0.5}L${toX} ${toY}`;
  }).join("");
  const marks = samples.map(({regularPixel: [y, x]}) =>
    `M${x + 0.5 - half} ${y + 0.5 - half}h${2 * half}v${2 * half}h${-2 * half}z`).join("");
  return [
    ...["halo", "position"].map((kind) => shape("rect", {
      x: middle[1] + 0.5 - cell[1] / 2, y: middle[0] + 0.5 - cell[0] / 2,
      width: cell[1], height: cell[0], class: kind,
    })),
    ...["halo", "line"].map((kind) => shape("path", {d: lines, class: kind})),
    ...["halo", "grid"].map((kind) => shape("path", {d: marks, class: kind})),
  ];
}

function draw() {
  const levels = sampleLevels(layers, state.layer, state.position, state.count, state.groups);
  const unit = pixel(), top = longest();
  const dots = levels.flatMap(({layer, samples}, level) => samples
    .filter((sample) => sample.pixel.every(Number.isFinite))
    .map((sample) => dot(layer, sample, level, level === levels.length - 1, unit, top)));
  drawing.replaceChildren(...gridOf(layers[state.layer], levels[0].samples, unit), ...dots);
  describe(levels);
}

/** A picture of a number for each kept position, painted by a function of its index. */
function painted(layer, paint) {
  const canvas = element("canvas", {width: layer.keptSize[1], height: layer.keptSize[0]});
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let position = 0; position < canvas.width * canvas.height; position++) {
    image.data.set([...paint(position), 255], 4 * position);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Paints the length, direction or mask of a layer's group. */
function painter(layer, group, kind, top) {
  const {length, dy, dx, mask} = layer.averages(group);
  if (kind === "mask") {
    const [least, most] = layer.maskRange;
    return (at) => colour((mask[at] - least) / (most - least));
  }
  if (kind === "direction") {
    const grey = [128, 128, 128];
    return (at) => {
      const strength = Math.min(1, Math.hypot(dy[at], dx[at]) / (0.5 * top));
      const strong = directionColour(dy[at], dx[at]);
      if (Number.isNaN(strength)) return grey;
      return grey.map((value, i) => value + (strong[i] - value) * strength);
    };
  }
  return (at) => colour(length[at] / top);
}

function drawMap() {
  const layer = layers[state.layer];
  map.style.display = state.map === "none" ? "none" : "";
  if (state.map !== "none") {
    const canvas = painted(layer, painter(layer, state.groups[state.layer], state.map, longest()));
    const cell = layer.strides.map((stride, axis) => stride * layer.scale[axis] * layer.step);
    const [y, x] = layer.middle([0, 0]);
    map.setAttribute("x", x + 0.5 - cell[1] / 2);
    map.setAttribute("y", y + 0.5 - cell[0] / 2);
    map.setAttribute("width", cell[1] * layer.keptSize[1]);
    map.setAttribute("height", cell[0] * layer.keptSize[0]);
    map.setAttribute("href", canvas.toDataURL());
  }
  drawScale(layer);
}

// --- The legend ---

function gradient() {
  const stops = COLOURS.map(css).join(", ");
  const bar = element("span", {class: "bar", "aria-hidden": "true"});
  bar.style.background = `linear-gradient(to right, ${stops})`;
  return bar;
}

function drawScale(layer) {
  const scale = (least, most, text) => element("p", {}, least, gradient(), most, ` ${text}`);
  const rows = [
    scale("0", number(longest(), longest() < 10 ? 1 : 0), "offset in pixels of the image"),
  ];
  if (state.map === "mask") {
    rows.push(scale(...layer.maskRange.map((value) => number(value)), "mean mask on the map"));
  }
  if (state.map === "direction") {
    const wheel = element("span", {class: "wheel", "aria-hidden": "true"});
    // From above, as CSS goes round.
    const angles = Array.from({length: 25}, (_, i) => (2 * Math.PI * i) / 24 - Math.PI / 2);
    const hues = angles.map((angle) => css(directionColour(Math.sin(angle), Math.cos(angle))));
    wheel.style.background = `conic-gradient(${hues.join(", ")})`;
    rows.push(element("p", {}, wheel, " mean direction on the map, grey where the mean is short"));
  }
  $("scale").replaceChildren(...rows);
}

function drawMarks() {
  const last = {class: "sample last", fill: css(colour(0.6)), stroke: "black"};
  const entries = [
    ["rect", {x: -4, y: -4, width: 8, height: 8, class: "grid"}, "regular grid"],
    ["circle", {r: 5, ...last}, "sample"],
    ["circle", {r: 5, class: "sample outside"}, "outside of its layer’s input: reads nothing"],
  ];
  if (layers.some((layer) => layer.mask)) {
    entries.push(["circle", {r: 2.5, ...last, "fill-opacity": 0.45}, "small mask"]);
  }
  const around = {viewBox: "-8 -8 16 16", class: "mark", "aria-hidden": "true"};
  $("marks").replaceChildren(...entries.map(([name, attributes, text]) =>
    element("span", {}, shape("svg", around, shape(name, attributes)), text)));
}

// --- What is told of the position ---

function describe(levels) {
  const layer = layers[state.layer];
  $("place").textContent = `Position (${state.position.join(", ")}) of ${by(layer.outSize)}`;
  $("levels").tBodies[0].replaceChildren(...levels.map(({layer, samples}, level) => {
    const outside = samples.filter((sample) => !sample.reads).length;
    return row(level + 1, layer.name, samples.length.toLocaleString("en"), outside);
  }));
  $("outside").textContent = outsideText(levels);
  $("samples").tBodies[0].replaceChildren(...levels[0].samples.map((sample) => row(
    `(${sample.tap.join(", ")})`, pair(sample.offset),
    `${pair(sample.place)}${sample.reads ? "" : " – outside"}`,
    sample.mask === null ? "–" : number(sample.mask))));
  announce(levels);
}

function row(...cells) {
  return element("tr", {}, ...cells.map((cell) => element("td", {}, `${cell}`)));
}

/** Names the samples that read nothing: those of the first level by tap, the others by number. */
function outsideText(levels) {
  const [{samples, layer}] = levels;
  const lost = samples.filter((sample) => !sample.reads);
  const named = lost.slice(0, MOST_NAMED).map((sample) => sample.offset.some(Number.isNaN)
    ? `tap (${sample.tap.join(", ")}), whose offset is NaN`
    : `tap (${sample.tap.join(", ")}) at (${pair(sample.place, 1)})`);
  if (lost.length > MOST_NAMED) named.push(`${lost.length - MOST_NAMED} more`);
  const input = `${layer.name}’s input of ${by(layer.inSize)}`;
  if (!named.length) return `All samples of level 1 lie inside ${input}.`;
  return `Outside ${input}: ${named.join("; ")}.`;
}

let announcing;
/** Tells screen readers, once the position rests. */
function announce(levels) {
  clearTimeout(announcing);
  announcing = setTimeout(() => {
    const parts = levels.map(({layer, samples}) => {
      const outside = samples.filter((sample) => !sample.reads).length;
      return `${layer.name}: ${many(samples.length, "sample")}, ${outside} outside`;
    });
    $("live").textContent = `Position ${state.position.join(", ")}. ${parts.join(". ")}.`;
  }, 400);
}

// --- Layers and their figures ---

function radio(name, value, onChange, ...children) {
  const input = element("input", {type: "radio", name, value});
  input.addEventListener("change", onChange);
  return element("label", {}, input, ...children);
}

function sums(layer, group) {
  const figures = layer.perGroup[group];
  const outside = `${share(figures.outside, figures.samples)} outside`;
  if (figures.mean === null) return `no finite offset, ${outside}`;
  return `mean offset ${number(figures.mean)} px, ${outside}`;
}

function listLayers() {
  $("layers").replaceChildren(...layers.map((layer, index) => {
    const top = layer.top * Math.max(...layer.scale);
    const thumbnail = painted(layer, painter(layer, 0, "length", top));
    thumbnail.setAttribute("aria-hidden", "true");
    const sizes = [`${by(layer.inSize)} → ${by(layer.outSize)}`];
    if (layer.groups > 1) sizes.push(many(layer.groups, "group"));
    if (layer.mask) sizes.push("masks");
    const text = element("span", {class: "text"}, element("strong", {}, layer.name),
      element("small", {}, sizes.join(", ")), element("small", {}, sums(layer, 0)));
    return radio("layer", index, () => choose({layer: index}), thumbnail, text);
  }));
}

function showFigures() {
  const layer = layers[state.layer], group = state.groups[state.layer];
  const figures = layer.perGroup[group];
  const ofGroup = layer.groups > 1 ? `, group ${group + 1}` : "";
  $("figures-title").textContent = layer.name + ofGroup;
  const notes = [
    `${layer.kind} of ${many(layer.taps.length, "tap")}, strides ${by(layer.strides)}, ` +
      `dilation ${by(layer.dilation)}.`,
    layer.previous === null
      ? "Its input comes from the image, through no other deformable layer."
      : `Its input comes from ${layers[layer.previous].name}.`,
    `Of ${many(figures.samples, "sample")}, ${figures.outside.toLocaleString("en")} ` +
      `(${share(figures.outside, figures.samples)}) lie outside of the input.`,
  ];
  if (figures.notNumbers) {
    notes.push(`${many(figures.notNumbers, "sample")} with an offset of NaN read nothing.`);
  }
  if (figures.mean !== null) {
    const inImage = figures.mean * Math.sqrt(layer.scale[0] * layer.scale[1]);
    notes.push(`Mean offset: ${number(figures.mean)} pixels of the input, ` +
      `${number(inImage)} of the image.`);
  }
  if (figures.maskMean !== null) notes.push(`Mean mask: ${number(figures.maskMean)}.`);
  if (layer.step > 1) {
    notes.push(`This page keeps one in ${layer.step} positions along each axis; ` +
      "the figures are of all.");
  }
  $("figures").textContent = notes.join(" ");
  $("charts").replaceChildren(
    histogram("Offset length, pixels of the input", figures.lengths, 0, layer.top),
    rose("Direction, weighted by length", figures.directions),
    ...(figures.masks ? [histogram("Mask", figures.masks, ...layer.maskRange)] : []));
}

// --- Choices ---

function countOfSamples(count) {
  return chain(layers, state.layer, count).reduce(
    (all, index) => all * layers[index].taps.length, 1);
}

function possibleCounts() {
  const most = chain(layers, state.layer, MOST_LEVELS).length;
  return [1, 2, 3].filter(
    (count) => count === 1 || (count <= most && countOfSamples(count) <= MOST_SAMPLES));
}

function possibleZooms() {
  return ZOOMS.filter((zoom) => zoom === 1 || Math.max(...size) / zoom >= LEAST_SHOWN);
}

function showControls() {
  const layer = layers[state.layer], possible = possibleCounts();
  for (const input of $("depths").querySelectorAll("input")) {
    input.disabled = !possible.includes(Number(input.value));
    input.checked = Number(input.value) === state.count;
  }
  for (const input of $("maps").querySelectorAll("input")) {
    input.disabled = input.value === "mask" && layer.mask === null;
    input.checked = input.value === state.map;
  }
  for (const input of $("zooms").querySelectorAll("input")) {
    input.checked = Number(input.value) === state.zoom;
  }
  for (const input of $("layers").querySelectorAll("input")) {
    input.checked = Number(input.value) === state.layer;
    if (input.checked) reveal(input.parentElement);
  }
  const select = $("groups").querySelector("select");
  $("groups").hidden = layer.groups === 1;
  select.replaceChildren(...Array.from({length: layer.groups}, (_, group) =>
    element("option", {value: group}, `${group + 1} of ${layer.groups}`)));
  select.value = state.groups[state.layer];
}

/** Scrolls the list of layers, and not the page, so far that an entry is seen. */
function reveal(entry) {
  const list = $("layers"), top = entry.offsetTop - list.offsetTop;
  list.scrollTop = clamped(list.scrollTop, top + entry.offsetHeight - list.clientHeight, top);
}

/** Changes the state, then all that shows it. */
function choose(changes) {
  Object.assign(state, changes);
  const layer = layers[state.layer];
  state.count = Math.max(...possibleCounts().filter((count) => count <= state.count));
  if (state.map === "mask" && layer.mask === null) state.map = "length";
  state.position = layer.positionAt(state.place);
  if ("zoom" in changes || !inSight(state.place)) look(layer.middle(state.position));
  showControls();
  drawMap();
  showFigures();
  draw();
}

/** Goes to the position at a place [h, w] in the image. */
function point(place) {
  const position = layers[state.layer].positionAt(place);
  state.place = place;
  if (position.every((at, axis) => at === state.position[axis])) return;
  state.position = position;
  draw();
}

function move(dy, dx) {
  const layer = layers[state.layer], steps = [dy, dx];
  state.position = layer.kept(state.position.map((at, axis) => at + steps[axis] * layer.step));
  state.place = layer.middle(state.position);
  hold(true);
  if (!inSight(state.place)) look(state.place);
  draw();
}

function hold(held) {
  state.held = held;
  $("stage").classList.toggle("held", held);
}

const next = (values, value) => values[(values.indexOf(value) + 1) % values.length];

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select")) return;
  // The arrows are also those of radio buttons, and scroll the page.
  if (event.key.startsWith("Arrow") && event.target !== $("stage")) return;
  const far = event.shiftKey ? 5 : 1, index = state.layer;
  const maps = [...$("maps").querySelectorAll("input:not(:disabled)")].map((input) => input.value);
  const actions = {
    ArrowUp: () => move(-far, 0), ArrowDown: () => move(far, 0),
    ArrowLeft: () => move(0, -far), ArrowRight: () => move(0, far),
    "[": () => choose({layer: Math.max(index - 1, 0)}),
    "]": () => choose({layer: Math.min(index + 1, layers.length - 1)}),
    g: () => chooseGroup((state.groups[index] + 1) % layers[index].groups),
    m: () => choose({map: next(maps, state.map)}),
    z: () => choose({zoom: next(possibleZooms(), state.zoom)}),
    Escape: () => hold(false),
  };
  for (const count of [1, 2, 3]) {
    actions[count] = () => possibleCounts().includes(count) && choose({count});
  }
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

function chooseGroup(group) {
  choose({groups: state.groups.with(state.layer, group)});
}

function onPointer(event) {
  const touched = event.pointerType !== "mouse";
  if (event.type === "pointerdown" && event.button !== 0) return;
  if (event.type === "pointermove" && (touched ? !event.buttons : state.held)) return;
  if (event.type === "pointerdown") hold(touched || !state.held);
  const area = svg.getBoundingClientRect();
  point([
    view[1] + ((event.clientY - area.top) / area.height) * view[3] - 0.5,
    view[0] + ((event.clientX - area.left) / area.width) * view[2] - 0.5,
  ]);
}

/** What the address asks for: #layer=conv3&at=4,5&levels=2&map=length&group=1 */
function followAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), changes = {};
  const named = layers.findIndex((each) => each.name === asked.get("layer"));
  const index = named < 0 ? state.layer : named, layer = layers[index];
  changes.layer = index;
  const at = (asked.get("at") ?? "").split(",").map(Number);
  if (at.length === 2 && at.every(Number.isInteger)) changes.place = layer.middle(layer.kept(at));
  const count = Number(asked.get("levels"));
  if ([1, 2, 3].includes(count)) changes.count = count;
  if (MAPS.includes(asked.get("map"))) changes.map = asked.get("map");
  const group = Number(asked.get("group") ?? NaN) - 1;
  if (layer.perGroup[group]) changes.groups = state.groups.with(index, group);
  choose(changes);
}

function start() {
  document.title = `${data.model} – ${document.title}`;
  $("about").textContent =
    `${data.model}, image of ${by(size)}, ${many(layers.length, "deformable layer")}`;
  $("depths").append(...[1, 2, 3].map((count) =>
    radio("count", count, () => choose({count}), `${count}`)));
  $("maps").append(...MAPS.map((kind) =>
    radio("map", kind, () => choose({map: kind}), kind)));
  $("zooms").append(...possibleZooms().map((zoom) =>
    radio("zoom", zoom, () => choose({zoom}), `${zoom}×`)));
  $("zooms").hidden = possibleZooms().length === 1;
  const select = $("groups").querySelector("select");
  select.addEventListener("change", () => chooseGroup(Number(select.value)));
  const stage = $("stage");
  stage.addEventListener("pointermove", onPointer);
  stage.addEventListener("pointerdown", onPointer);
  addEventListener("keydown", onKey);
  listLayers();
  drawMarks();
  followAddress();
  addEventListener("hashchange", followAddress);
  new ResizeObserver(draw).observe(stage);
}

start();
