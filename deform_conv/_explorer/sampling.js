"use strict";

// What the page holds, and where it says that layers sample. As deform_conv/_explorer/record.py.

/** The number that each pattern of 16 bits is as a float16. */
function halfNumbers() {
  const numbers = new Float32Array(1 << 16);
  for (let bits = 0; bits < numbers.length; bits++) {
    const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
    if (exponent === 0) numbers[bits] = sign * fraction * 2 ** -14;
    else if (exponent === 31) numbers[bits] = fraction ? NaN : sign * Infinity;
    else numbers[bits] = sign * (1 + fraction) * 2 ** (exponent - 15);
  }
  return numbers;
}

const HALVES = halfNumbers();

/** The float16 numbers that a base64 text holds. */
function decoded(text) {
  const bytes = atob(text), numbers = new Float32Array(bytes.length / 2);
  for (let i = 0; i < numbers.length; i++) {
    numbers[i] = HALVES[bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8)];
  }
  return numbers;
}

/** Places [h, w] of one plane of pixels in another of the same extent, centres aligned. */
function rescaled(place, fromSize, toSize) {
  return place.map((along, axis) => ((along + 0.5) * toSize[axis]) / fromSize[axis] - 0.5);
}

const clamped = (value, least, greatest) => Math.min(Math.max(value, least), greatest);

class Layer {
  constructor(data) {
    Object.assign(this, data);
    this.offset = decoded(data.offset);
    this.mask = data.mask === null ? null : decoded(data.mask);
    this.keptSize = this.outSize.map((size) => Math.ceil(size / this.step));
  }

  /** Where a place [h, w] of the input is in the image. */
  inImage(place) {
    return place.map((along, axis) => this.scale[axis] * along + this.shift[axis]);
  }

  /** The kept position nearest to a position [y, x], which may lie outside and between. */
  kept(position) {
    return position.map(
      (at, axis) => clamped(Math.round(at / this.step), 0, this.keptSize[axis] - 1) * this.step);
  }

  /** The position whose window is nearest to a place [h, w] in the image. */
  positionAt(place) {
    const inInput = place.map((along, axis) => (along - this.shift[axis]) / this.scale[axis]);
    return this.kept(inInput.map(
      (along, axis) => (along - this.firstMiddle[axis]) / this.strides[axis]));
  }

  /** The middle of a position's window, [h, w] in the image. */
  middle(position) {
    return this.inImage(
      position.map((at, axis) => this.firstMiddle[axis] + at * this.strides[axis]));
  }

  /** The index of the first sample of a kept position and group. */
  first(position, group) {
    const [row, column] = position.map((at) => at / this.step);
    return ((row * this.keptSize[1] + column) * this.groups + group) * this.taps.length;
  }

  /** The samples of a kept position [y, x] and a group. */
  samples(position, group) {
    const first = this.first(position, group);
    return this.taps.map((tap, index) => {
      const offset = [this.offset[2 * (first + index)], this.offset[2 * (first + index) + 1]];
      const regular = tap.map((number, axis) =>
        this.start[axis] + position[axis] * this.strides[axis] + number * this.dilation[axis]);
      const place = regular.map((along, axis) => along + offset[axis]);
      return {
        tap, offset, place,
        regularPixel: this.inImage(regular),
        pixel: this.inImage(place),
        length: Math.hypot(offset[0] * this.scale[0], offset[1] * this.scale[1]),
        mask: this.mask === null ? null : this.mask[first + index],
        reads: place.every((along, axis) => along > -1 && along < this.inSize[axis]),
      };
    });
  }

  /** The mean offset length, direction and mask of a group, of all kept positions. */
  averages(group) {
    const count = this.keptSize[0] * this.keptSize[1], taps = this.taps.length;
    const length = new Float32Array(count), mask = new Float32Array(count);
    const dy = new Float32Array(count), dx = new Float32Array(count);
    for (let position = 0; position < count; position++) {
      const first = (position * this.groups + group) * taps;
      for (let sample = first; sample < first + taps; sample++) {
        const y = this.offset[2 * sample] * this.scale[0];
        const x = this.offset[2 * sample + 1] * this.scale[1];
        length[position] += Math.hypot(y, x) / taps;
        dy[position] += y / taps;
        dx[position] += x / taps;
        if (this.mask) mask[position] += this.mask[sample] / taps;
      }
    }
    return {length, dy, dx, mask};
  }
}

/** The layer and those before it, down to the image, at most `count`. */
function chain(layers, index, count) {
  const found = [];
  for (let at = index; at !== null && found.length < count; at = layers[at].previous) {
    found.push(at);
  }
  return found;
}

/** The samples of each level: of a position, then of the positions nearest to its samples... */
function sampleLevels(layers, index, position, count, groups) {
  let positions = [position];
  return chain(layers, index, count).map((at) => {
    const layer = layers[at];
    const samples = positions.flatMap((each) => layer.samples(each, groups[at]));
    if (layer.previous !== null) {
      const before = layers[layer.previous];
      positions = samples.filter((sample) => sample.reads).map((sample) => {
        const inOutput = rescaled(sample.place, layer.inSize, before.outSize);
        const nearest = inOutput.map(
          (along, axis) => clamped(Math.floor(along + 0.5), 0, before.outSize[axis] - 1));
        return before.kept(nearest);
      });
    }
    return {layer, samples};
  });
}

// The colours of "plasma", without its darkest ones, which would not be seen on dark images.
const COLOURS = [
  [126, 3, 168], [158, 24, 157], [186, 51, 136], [209, 78, 114], [228, 106, 92], [243, 138, 71],
  [252, 174, 51], [249, 214, 38], [240, 249, 33],
];

/** The colour [r, g, b] of a share from 0 to 1. */
function colour(share) {
  if (Number.isNaN(share)) return [128, 128, 128];
  const at = clamped(share, 0, 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  return COLOURS[low].map(
    (value, index) => Math.round(value + (COLOURS[low + 1][index] - value) * (at - low)));
}

/** The colour of a direction (dy, dx): the hue, red to the right, then yellow downwards. */
function directionColour(dy, dx) {
  const hue = Math.atan2(dy, dx) / (2 * Math.PI);
  return [0, 1 / 3, 2 / 3].map(
    (shift) => Math.round(150 + 100 * Math.cos(2 * Math.PI * (hue - shift))));
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
