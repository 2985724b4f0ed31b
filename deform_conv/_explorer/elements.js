// Elements of the page, numbers as text, and charts.

/** A new element of HTML, with attributes and children. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A new element of SVG. */
function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function number(value, digits = 2) {
  const text = Number.isFinite(value) ? value.toFixed(digits) : `${value}`;
  return /^-0\.?0*$/.test(text) ? text.slice(1) : text.replace("-", "−");
}
const pair = (values, digits = 2) => values.map((value) => number(value, digits)).join(", ");
const by = (values) => values.join("\u00a0×\u00a0");
const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const share = (part, whole) => (whole ? `${number((100 * part) / whole, 1)}\u00a0%` : "–");

function chart(title, drawing) {
  return element("figure", {}, element("figcaption", {}, title), drawing);
}

/** Shares in equal bins from `least` to `most`, as columns. */
function histogram(title, shares, least, most) {
  const width = 240, height = 72, top = Math.max(...shares, 1e-9), bin = width / shares.length;
  const bars = shares.map((value, i) => {
    const tall = (value / top) * height, start = least + ((most - least) * i) / shares.length;
    const column = {x: i * bin, y: height - tall, width: bin - 1, height: tall, class: "column"};
    return shape("rect", column, shape("title", {}, `${share(value, 1)} from ${number(start)}`));
  });
  const label = (x, anchor, text) =>
    shape("text", {x, y: height + 14, "text-anchor": anchor}, text);
  const told = `${title}: histogram from ${number(least)} to ${number(most)}`;
  const drawing = shape(
    "svg", {viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": told}, ...bars,
    shape("path", {d: `M0 ${height}H${width}`, class: "axis"}),
    label(0, "start", number(least)), label(width, "end", number(most)));
  return chart(title, drawing);
}

/** Shares in equal sectors, from the right and then downwards, as areas of petals. */
function rose(title, shares) {
  const radius = 44, top = Math.max(...shares, 1e-9), sector = (2 * Math.PI) / shares.length;
  const petals = shares.map((value, i) => {
    const r = radius * Math.sqrt(value / top), from = i * sector, to = from + sector * 0.94;
    const point = (angle) => `${r * Math.cos(angle)} ${r * Math.sin(angle)}`;
    return shape("path", {
      d: `M0 0L${point(from)}A${r} ${r} 0 0 1 ${point(to)}z`,
      fill: css(directionColour(Math.sin(from + sector / 2), Math.cos(from + sector / 2))),
    });
  });
  const label = (x, y, text) => shape("text", {x, y, "text-anchor": "middle"}, text);
  const told = `${title}: a rose of ${shares.length} sectors`;
  const drawing = shape(
    "svg", {viewBox: "-120 -60 240 120", role: "img", "aria-label": told},
    shape("circle", {r: radius, class: "axis"}), ...petals,
    label(0, -49, "up"), label(0, 58, "down"), label(-62, 4, "left"), label(64, 4, "right"));
  return chart(title, drawing);
}
