#include "problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "elements.h"

namespace deform_conv::fuzz {
namespace {

// --- Sizes ---

constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max();

// One axis of the problem.
struct Axis {
  int64_t in, kernel, stride, dilation, pad_before, pad_after;
  int64_t out;

  int64_t extent() const { return (kernel - 1) * dilation + 1; }
};

// Sets the output size, and the padding before that follows. Returns whether the axis is valid.
bool Settle(Padding padding, Axis& axis) {
  if (axis.extent() > kMaxExtent) return false;
  if (padding == Padding::kSame) {
    axis.out = axis.in / axis.stride + (axis.in % axis.stride != 0 ? 1 : 0);
    const int64_t missing = (axis.out - 1) * axis.stride + axis.extent() - axis.in;
    axis.pad_before = std::max<int64_t>(missing, 0) / 2;
    return axis.in + std::max<int64_t>(missing, 0) <= kMaxExtent;
  }
  if (padding == Padding::kValid) axis.pad_before = axis.pad_after = 0;
  const int64_t padded = axis.pad_before + axis.in + axis.pad_after;
  // The last position at which the kernel fits, and the first one; none where it never does.
  axis.out = padded < axis.extent() ? 0 : (padded - axis.extent()) / axis.stride + 1;
  return padded <= kMaxExtent && axis.extent() - padded <= axis.stride;
}

struct Sizes {
  int64_t batch, groups, group_in, group_out, deform_groups;
  bool has_filters;
  Padding padding;
  Axis height, width;

  // Multiplications of a naive loop, and all that is stored.
  double work() const {
    const double taps = double(height.kernel) * width.kernel, channels = double(groups) * group_in;
    const double positions = double(batch) * height.out * width.out;
    return positions * taps * (channels * (group_out + 6) + 8.0 * deform_groups) +
           positions * groups * group_out + double(batch) * height.in * width.in * channels +
           3 * taps * channels * group_out;
  }
};

int64_t DrawChannels(Random& random, bool eights) {
  if (eights) return 8 * random.Pick({1, 1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 24, 32, 33});
  if (random.Chance(0.06)) return random.Pick({48, 63, 64, 65, 96, 127, 128, 144, 200, 257});
  if (random.Chance(0.3)) return random.Pick({15, 16, 17, 24, 31, 32, 33});
  return random.Pick({1, 1, 2, 3, 3, 4, 5, 7, 8, 8, 9, 12});
}

int64_t DrawDivisor(Random& random, int64_t number) {
  if (random.Chance(0.5)) return 1;
  int64_t divisor = random.Between(1, number);
  while (number % divisor != 0) --divisor;
  return divisor;
}

Axis DrawAxis(Random& random) {
  Axis axis = {};
  axis.kernel = random.Pick({1, 1, 2, 2, 3, 3, 3, 3, 4, 5, 7});
  axis.in = random.Chance(0.02)   ? 0
            : random.Chance(0.08) ? 1
            : random.Chance(0.05) ? random.Between(10, 80)
                                  : random.Between(1, 11);
  axis.stride = random.Chance(0.65) ? 1 : random.Chance(0.6) ? 2 : random.Between(1, 7);
  axis.dilation = random.Chance(0.7) ? 1 : random.Between(1, 5);
  if (random.Chance(0.7)) {
    axis.pad_before = random.Between(0, 3);
    axis.pad_after = random.Between(0, 3);
  } else {
    axis.pad_before = random.Between(0, axis.extent() + 2);
    axis.pad_after = random.Between(0, axis.extent() + 2);
  }
  return axis;
}

// Coordinates that leave 32 bits, or nearly so.
void MakeExtreme(Random& random, Axis& axis) {
  const int64_t size = random.Pick<int64_t>(
      {(int64_t{1} << 29) - 1, int64_t{1} << 29, int64_t{1} << 30, kMaxExtent / 2, kMaxExtent});
  switch (random.Between(0, 3)) {
    case 0:
      axis.stride = size;
      break;
    case 1:
      axis.dilation = size;
      break;
    case 2:
      axis.pad_before = size;
      axis.stride = random.Pick<int64_t>({size, size / 3, kMaxExtent});
      break;
    default:
      axis.dilation = size / 4;
      axis.stride = size / 8;
      axis.pad_before = axis.pad_after = size / 4;
  }
}

// Makes one of the sizes smaller.
void Shrink(Random& random, bool eights, Sizes& sizes) {
  const auto halve = [](int64_t& size) { size = std::max<int64_t>(size / 2, 1); };
  const auto halve_channels = [eights](int64_t& size) {
    size = eights ? std::max<int64_t>(size / 16 * 8, 8) : std::max<int64_t>(size / 2, 1);
  };
  Axis& axis = random.Chance(0.5) ? sizes.height : sizes.width;
  switch (random.Between(0, 9)) {
    case 0:
    case 1:
      return halve(sizes.batch);
    case 2:
    case 3:
    case 4:
      return halve(axis.in);
    case 5:
      axis.pad_before /= 2;
      axis.pad_after /= 2;
      return;
    case 6:
      return halve(axis.kernel);
    case 7:
      return halve_channels(sizes.group_out);
    case 8:
      halve_channels(sizes.group_in);
      sizes.deform_groups = 1;
      return;
    default:
      halve(sizes.groups);
      sizes.deform_groups = 1;
  }
}

// What is left without filters: each channel is a group of its own.
void DropFilters(Sizes& sizes) {
  sizes.has_filters = false;
  sizes.groups *= sizes.group_in;
  sizes.group_in = sizes.group_out = 1;
}

Sizes DrawAnySizes(Random& random, const Shaping& shaping) {
  const bool eights = shaping.eights;
  Sizes sizes = {};
  sizes.has_filters = true;
  sizes.batch = random.Chance(0.02)   ? 0
                : random.Chance(0.5)  ? 1
                : random.Chance(0.85) ? random.Between(1, 5)
                                      : random.Between(5, 40);
  sizes.groups = random.Chance(0.65) ? 1 : random.Pick({2, 2, 2, 3, 3, 4, 5, 8, 16, 33});
  sizes.group_in = DrawChannels(random, eights);
  sizes.group_out = DrawChannels(random, eights);
  if (!eights && random.Chance(0.15)) {  // a depthwise layer
    sizes.groups = random.Pick({2, 3, 8, 15, 16, 24, 32, 40, 64, 66, 96});
    sizes.group_in = 1;
    sizes.group_out = random.Pick({1, 1, 1, 2, 3});
  }
  if (!eights && random.Chance(shaping.without_filters)) DropFilters(sizes);
  sizes.deform_groups = DrawDivisor(random, sizes.groups * sizes.group_in);
  sizes.padding = random.Pick(
      {Padding::kSame, Padding::kSame, Padding::kValid, Padding::kExplicit, Padding::kExplicit});
  sizes.height = DrawAxis(random);
  sizes.width = DrawAxis(random);
  if (random.Chance(0.01)) MakeExtreme(random, random.Chance(0.5) ? sizes.height : sizes.width);
  return sizes;
}

// Most problems are small, and a few have channels or filters for several slices and rounds.
double DrawWork(Random& random) {
  const double exponent = random.Chance(0.9)    ? 3.4 + 1.8 * random.Unit()
                          : random.Chance(0.95) ? 5 + 0.7 * random.Unit()
                                                : 5.7 + 0.8 * random.Unit();
  return std::pow(10, exponent);
}

// Hundreds of channels, so that filters take several rounds.
void MakeFiltersLarge(Random& random, Sizes& sizes) {
  sizes.batch = random.Between(1, 2);
  sizes.groups = random.Between(1, 2);
  sizes.group_in = random.Between(300, 600);
  sizes.group_out = random.Between(150, 300);
  sizes.deform_groups = DrawDivisor(random, sizes.groups * sizes.group_in);
  sizes.height.in = random.Between(1, 2);
  sizes.width.in = random.Between(1, 2);
}

// A deformable group for each channel and many taps, so that gradients of offset and mask take
// several bands.
void MakeOffsetsLarge(Random& random, Sizes& sizes) {
  sizes.batch = random.Between(1, 2);
  sizes.groups = random.Chance(0.5) ? 1 : 16;
  sizes.group_in = random.Between(2, 3) * 16 / sizes.groups;
  sizes.group_out = 1;
  sizes.deform_groups = sizes.groups * sizes.group_in;
  for (Axis* axis : {&sizes.height, &sizes.width}) {
    axis->kernel = random.Between(4, 7);
    axis->in = random.Between(8, 13);
    axis->stride = axis->dilation = 1;
  }
}

Sizes DrawValidSizes(Random& random, const Shaping& shaping) {
  const double most_work = shaping.work * DrawWork(random);
  for (;;) {
    Sizes sizes = DrawAnySizes(random, shaping);
    if (random.Chance(0.006)) {
      const bool filters = sizes.has_filters && random.Chance(0.6);
      filters ? MakeFiltersLarge(random, sizes) : MakeOffsetsLarge(random, sizes);
      if (!sizes.has_filters) DropFilters(sizes);
      if (Settle(sizes.padding, sizes.height) && Settle(sizes.padding, sizes.width) &&
          sizes.work() < 6e6) {
        return sizes;
      }
    }
    for (int tries = 0; tries < 60; ++tries) {
      const bool valid = Settle(sizes.padding, sizes.height) & Settle(sizes.padding, sizes.width);
      if (valid && sizes.work() <= most_work) return sizes;
      if (!valid && tries > 20) break;
      Shrink(random, shaping.eights, sizes);
    }
  }
}

// --- Values ---

enum class Values { kNormal, kIntegers, kZeros, kLarge, kHuge, kNonFinite, kTiny, kCount };

const char* NameOf(Values values) {
  const char* const names[] = {"normal", "integers", "zeros", "large", "huge", "nonfinite", "tiny"};
  return names[static_cast<int>(values)];
}

Values DrawCharacter(Random& random) {
  if (random.Chance(0.75)) return random.Chance(0.85) ? Values::kNormal : Values::kIntegers;
  return static_cast<Values>(random.Between(0, static_cast<int>(Values::kCount) - 1));
}

double DrawNonFinite(Random& random) {
  return random.Pick({double{NAN}, double{INFINITY}, -double{INFINITY}});
}

std::vector<double> DrawValues(Random& random, ElementType type, int64_t size, const char* name,
                               std::string& description) {
  const Range range = RangeOf(type);
  const Values character = DrawCharacter(random);
  // In places: a number in so many is out of the ordinary.
  const double share = random.Pick({0.5, 0.1, 0.02});
  // Products of four such numbers and their sums stay finite; of 16 bits they may not.
  const double large = type == ElementType::kDouble ? 1e60 : range.largest > 1e38 ? 1e7 : 100;
  std::vector<double> values(size);
  for (double& value : values) {
    value = character == Values::kIntegers ? static_cast<double>(random.Between(-3, 3))
                                           : random.Normal();
    if (character > Values::kIntegers && random.Chance(share)) {
      const double sign = random.Pick({1.0, -1.0});
      switch (character) {
        case Values::kZeros:
          value = sign * 0.0;
          break;
        case Values::kLarge:
          value *= large;
          break;
        case Values::kHuge:
          value = sign * range.largest * random.Pick({1.0, 0.5, 0.01});
          break;
        case Values::kNonFinite:
          value = DrawNonFinite(random);
          break;
        default:
          value = sign * range.smallest * static_cast<double>(random.Between(0, 100));
      }
    }
    value = Rounded(type, value);
  }
  description += std::string(name) + " " + NameOf(character) + ", ";
  return values;
}

enum class Offsets {
  kZero,
  kSmall,
  kWide,  // over the whole image and beyond
  kInteger,
  kHalf,    // half-integers
  kBorder,  // at or beside the ends of the image
  kHuge,
  kNonFinite,
  kTiny,
  kCount
};

const char* NameOf(Offsets offsets) {
  const char* const names[] = {"zero",   "small", "wide",      "integer", "half",
                               "border", "huge",  "nonfinite", "tiny"};
  return names[static_cast<int>(offsets)];
}

// `size` is the image's along this axis.
double DrawOffset(Random& random, Offsets character, ElementType type, int64_t base, int64_t size) {
  const double sign = random.Pick({1.0, -1.0});
  switch (character) {
    case Offsets::kZero:
      return sign * 0.0;
    case Offsets::kSmall:
      return 0.7 * random.Normal();
    case Offsets::kWide:
      return random.Unit() * static_cast<double>(size + 4) - static_cast<double>(base + 2);
    case Offsets::kInteger:
      return static_cast<double>(random.Between(-4, 4));
    case Offsets::kHalf:
      return static_cast<double>(random.Between(-5, 5)) + 0.5;
    case Offsets::kBorder: {
      const double end = static_cast<double>(random.Pick<int64_t>({-1, 0, size - 1, size}) - base);
      const double step = random.Pick({0.0, 1.0, -1.0});
      if (type == ElementType::kDouble) return step == 0 ? end : std::nextafter(end, end + step);
      const float rounded = static_cast<float>(end);
      return step == 0 ? rounded : std::nextafterf(rounded, static_cast<float>(end + step));
    }
    case Offsets::kHuge: {
      if (random.Chance(0.2)) return sign * RangeOf(type).largest;
      const int exponent = random.Pick({23, 29, 30, 31, 32, 40, 52, 62, 63, 64, 100});
      return sign * (std::ldexp(1, exponent) + static_cast<double>(random.Between(-1, 1)));
    }
    case Offsets::kNonFinite:
      return DrawNonFinite(random);
    default:
      return sign * (random.Chance(0.5) ? RangeOf(type).smallest
                                        : std::ldexp(1, -static_cast<int>(random.Between(20, 60))));
  }
}

std::vector<double> DrawOffsets(Random& random, const Problem& problem, std::string& description) {
  const DeformConvParams& params = problem.params;
  const ElementType type = OffsetTypeOf(problem.type);
  Offsets characters[3];
  for (Offsets& character : characters) {
    character =
        random.Chance(0.3)
            ? Offsets::kSmall
            : static_cast<Offsets>(random.Between(0, static_cast<int>(Offsets::kCount) - 1));
  }
  const int64_t kinds = random.Between(1, 3);
  description += "offset";
  for (int64_t i = 0; i < kinds; ++i) description += std::string(" ") + NameOf(characters[i]);
  description += ", ";

  std::vector<double> offsets;
  offsets.reserve(params.out_positions() * params.offset_channels());
  const auto draw = [&](int64_t base, int64_t size) {
    const Offsets character = characters[random.Between(0, kinds - 1)];
    offsets.push_back(Rounded(type, DrawOffset(random, character, type, base, size)));
  };
  for (int64_t position = 0; position < params.out_positions(); ++position) {
    const int64_t y = position / params.out_w % params.out_h, x = position % params.out_w;
    for (int64_t g = 0; g < params.deform_groups; ++g) {
      for (int64_t ky = 0; ky < params.kernel_h; ++ky) {
        for (int64_t kx = 0; kx < params.kernel_w; ++kx) {
          draw(BaseOf(y, params.stride_h, params.pad_top, ky, params.dilation_h), params.in_h);
          draw(BaseOf(x, params.stride_w, params.pad_left, kx, params.dilation_w), params.in_w);
        }
      }
    }
  }
  return offsets;
}

void Print(std::ostream& stream, const char* name, const std::vector<double>& values) {
  stream << "\n  " << name << " = {";
  for (size_t i = 0; i < values.size(); ++i) stream << (i > 0 ? ", " : "") << values[i];
  stream << "}";
}

}  // namespace

Problem DrawSizes(Random& random, const Shaping& shaping) {
  const Sizes sizes = DrawValidSizes(random, shaping);
  const Axis &height = sizes.height, &width = sizes.width;
  Problem problem = {};
  problem.attributes = {height.stride,   width.stride,        height.dilation,  width.dilation,
                        sizes.padding,   height.pad_before,   height.pad_after, width.pad_before,
                        width.pad_after, sizes.deform_groups, height.kernel,    width.kernel};
  if (sizes.padding != Padding::kExplicit) {  // then they are not read
    problem.attributes.pad_top = problem.attributes.pad_left = 0;
    problem.attributes.pad_bottom = problem.attributes.pad_right = 0;
  }
  DeformConvParams& params = problem.params;
  params.batch = sizes.batch;
  params.in_h = height.in;
  params.in_w = width.in;
  params.in_channels = sizes.groups * sizes.group_in;
  params.out_h = height.out;
  params.out_w = width.out;
  params.out_channels = sizes.groups * sizes.group_out;
  params.kernel_h = height.kernel;
  params.kernel_w = width.kernel;
  params.stride_h = height.stride;
  params.stride_w = width.stride;
  params.dilation_h = height.dilation;
  params.dilation_w = width.dilation;
  params.pad_top = height.pad_before;
  params.pad_left = width.pad_before;
  params.groups = sizes.groups;
  params.deform_groups = sizes.deform_groups;
  params.has_filters = sizes.has_filters;
  params.has_mask = !params.has_filters || random.Chance(0.5);

  DeformConvShapes& shapes = problem.shapes;
  shapes.input = {params.batch, params.in_h, params.in_w, params.in_channels};
  shapes.filters = {params.kernel_h, params.kernel_w, sizes.group_in, params.out_channels};
  shapes.offset = {params.batch, params.out_h, params.out_w, params.offset_channels()};
  shapes.mask = {};
  if (params.has_mask) {
    shapes.mask = {params.batch, params.out_h, params.out_w, params.mask_channels()};
  }
  shapes.has_mask = params.has_mask;
  shapes.has_filters = params.has_filters;
  return problem;
}

Problem DrawProblem(Random& random, ElementType type, const Shaping& shaping) {
  Problem problem = DrawSizes(random, shaping);
  problem.type = type;
  const DeformConvParams& params = problem.params;
  const auto draw = [&](ElementType of, int64_t size, const char* name) {
    return DrawValues(random, of, size, name, problem.values);
  };
  problem.input = draw(type, params.batch * params.image_size(), "input");
  problem.filters = params.has_filters ? draw(type, params.filters_size(), "filters")
                                       : std::vector<double>(params.filters_size(), 1);
  problem.offset = DrawOffsets(random, problem, problem.values);
  if (params.has_mask) {
    problem.mask =
        draw(OffsetTypeOf(type), params.out_positions() * params.mask_channels(), "mask");
  }
  problem.grad_output = draw(type, params.out_positions() * params.out_channels, "grad_output");
  problem.filters_before = draw(type, params.filters_size(), "filters' gradient before");
  return problem;
}

std::string Describe(const Problem& problem, bool numbers) {
  const DeformConvAttributes& attributes = problem.attributes;
  std::ostringstream stream;
  stream.precision(17);
  const auto print = [&stream](const char* name, std::initializer_list<int64_t> sizes) {
    stream << " " << name << " ";
    for (const int64_t& size : sizes) stream << (&size == sizes.begin() ? "[" : ", ") << size;
    stream << "]";
  };
  const auto shape = [&](const char* name, const std::array<int64_t, 4>& of) {
    print(name, {of[0], of[1], of[2], of[3]});
  };
  stream << "  " << NameOf(problem.type);
  shape("input", problem.shapes.input);
  if (problem.shapes.has_filters) {
    shape("filters", problem.shapes.filters);
  } else {
    print("kernel_size", {attributes.kernel_h, attributes.kernel_w});
  }
  shape("offset", problem.shapes.offset);
  if (problem.shapes.has_mask) shape("mask", problem.shapes.mask);
  stream << "\n ";
  print("strides", {attributes.stride_h, attributes.stride_w});
  print("dilations", {attributes.dilation_h, attributes.dilation_w});
  if (attributes.padding == Padding::kExplicit) {
    print("padding",
          {attributes.pad_top, attributes.pad_bottom, attributes.pad_left, attributes.pad_right});
  } else {
    stream << " padding " << (attributes.padding == Padding::kSame ? "SAME" : "VALID");
  }
  stream << " deform_groups " << attributes.deform_groups << "\n  " << problem.values;
  if (!numbers) return stream.str();
  Print(stream, "input", problem.input);
  if (problem.shapes.has_filters) Print(stream, "filters", problem.filters);
  Print(stream, "offset", problem.offset);
  if (problem.shapes.has_mask) Print(stream, "mask", problem.mask);
  Print(stream, "grad_output", problem.grad_output);
  return stream.str();
}

}  // namespace deform_conv::fuzz
