#include "reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <sstream>

#include "elements.h"

namespace deform_conv::fuzz {
namespace {

// Where a sample lies on one axis. An offset is compared with whole numbers and split without the
// base being added, so nothing is rounded.
struct AxisSample {
  bool inside;
  int64_t low;
  double fraction;
  bool rounded;  // whether the fraction takes more digits than the offset has

  AxisSample(int64_t base, double offset, int64_t size) {
    inside = offset > static_cast<double>(-1 - base) && offset < static_cast<double>(size - base);
    if (!inside) return;
    const double whole = std::floor(offset);
    low = base + static_cast<int64_t>(whole);
    fraction = offset - whole;
    rounded = offset < 0 && fraction != 0;
  }
};

// A pixel that has a part in a sample.
struct Corner {
  int64_t pixel;
  double weight, weight_magnitude;
  double h_slope, h_magnitude;  // derivative of the weight along h
  double w_slope, w_magnitude;
};

struct Sample {
  Corner corners[4];
  int count = 0;
  bool inside;

  Sample(const AxisSample& h, const AxisSample& w, int64_t in_h, int64_t in_w)
      : inside(h.inside && w.inside && in_h > 0 && in_w > 0) {
    if (!inside) return;
    for (int down = 0; down < 2; ++down) {
      for (int right = 0; right < 2; ++right) {
        const int64_t y = h.low + down, x = w.low + right;
        if (y < 0 || y >= in_h || x < 0 || x >= in_w) continue;
        const double along_h = down ? h.fraction : 1 - h.fraction;
        const double along_w = right ? w.fraction : 1 - w.fraction;
        // A fraction that is rounded is off by as much as 1 is.
        const double h_magnitude = along_h + (h.rounded ? 1 : 0);
        const double w_magnitude = along_w + (w.rounded ? 1 : 0);
        corners[count++] = {y * in_w + x,
                            along_h * along_w,
                            h_magnitude * w_magnitude,
                            down ? along_w : -along_w,
                            w_magnitude,
                            right ? along_h : -along_h,
                            h_magnitude};
      }
    }
  }
};

// The sum of a channel's terms, and of their absolute values.
struct Sum {
  double value = 0, magnitude = 0;

  void Add(double term, double term_magnitude) {
    value += term;
    magnitude += term_magnitude;
  }
};

class Loop {
 public:
  Loop(const Problem& problem, bool backward)
      : problem_(problem), params_(problem.params), backward_(backward) {}

  Reference Run() {
    const auto resize = [](Expected& expected, int64_t size, int64_t additions) {
      expected.values.assign(size, 0);
      expected.magnitudes.assign(size, 0);
      expected.additions = static_cast<double>(additions);
    };
    const int64_t taps = params_.taps(), positions = params_.out_positions();
    const int64_t group_out = params_.group_out_channels();
    resize(results_.output, positions * params_.out_channels, taps * params_.group_in_channels());
    if (backward_) {
      resize(results_.grad_input, params_.batch * params_.image_size(),
             params_.image_positions() * taps + group_out);
      resize(results_.grad_filters, params_.filters_size(), positions);
      resize(results_.grad_offset, positions * params_.offset_channels(),
             4 * params_.deform_group_channels() + group_out);
      resize(results_.grad_mask, positions * params_.mask_channels(),
             4 * params_.deform_group_channels() + group_out);
    }
    for (int64_t position = 0; position < positions; ++position) {
      for (int64_t ky = 0; ky < params_.kernel_h; ++ky) {
        for (int64_t kx = 0; kx < params_.kernel_w; ++kx) {
          for (int64_t g = 0; g < params_.deform_groups; ++g) AddTap(position, ky, kx, g);
        }
      }
    }
    return std::move(results_);
  }

 private:
  void AddTap(int64_t position, int64_t ky, int64_t kx, int64_t g) {
    const int64_t y = position / params_.out_w % params_.out_h, x = position % params_.out_w;
    const int64_t tap = ky * params_.kernel_w + kx;
    const int64_t index = (position * params_.deform_groups + g) * params_.taps() + tap;
    const AxisSample h(BaseOf(y, params_.stride_h, params_.pad_top, ky, params_.dilation_h),
                       problem_.offset[2 * index], params_.in_h);
    const AxisSample w(BaseOf(x, params_.stride_w, params_.pad_left, kx, params_.dilation_w),
                       problem_.offset[2 * index + 1], params_.in_w);
    const Sample sample(h, w, params_.in_h, params_.in_w);
    // Outside the image, a sample is 0 whatever its mask, and has no gradients.
    const double mask = !sample.inside ? 0 : params_.has_mask ? problem_.mask[index] : 1;
    const double mask_magnitude = std::fabs(mask);
    const int64_t image = position / params_.image_positions() * params_.image_size();

    Sum grad_h, grad_w, grad_mask;
    const int64_t width = params_.deform_group_channels();
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      Sum pixels;
      for (int i = 0; i < sample.count; ++i) {
        const Corner& corner = sample.corners[i];
        const double pixel = problem_.input[image + corner.pixel * params_.in_channels + c];
        pixels.Add(corner.weight * pixel, corner.weight_magnitude * std::fabs(pixel));
      }
      const Sum grad_column =
          AddChannel(position, tap, c, {mask * pixels.value, mask_magnitude * pixels.magnitude});
      if (!backward_ || !sample.inside) continue;

      grad_mask.Add(grad_column.value * pixels.value, grad_column.magnitude * pixels.magnitude);
      const double grad = mask * grad_column.value;
      const double grad_magnitude = mask_magnitude * grad_column.magnitude;
      for (int i = 0; i < sample.count; ++i) {
        const Corner& corner = sample.corners[i];
        const int64_t at = image + corner.pixel * params_.in_channels + c;
        const double pixel = problem_.input[at], pixel_magnitude = std::fabs(pixel);
        results_.grad_input.values[at] += corner.weight * grad;
        results_.grad_input.magnitudes[at] += corner.weight_magnitude * grad_magnitude;
        grad_h.Add(grad * corner.h_slope * pixel,
                   grad_magnitude * corner.h_magnitude * pixel_magnitude);
        grad_w.Add(grad * corner.w_slope * pixel,
                   grad_magnitude * corner.w_magnitude * pixel_magnitude);
      }
    }
    if (!backward_) return;
    const auto write = [](Expected& gradient, int64_t at, const Sum& sum) {
      gradient.values[at] = sum.value;
      gradient.magnitudes[at] = sum.magnitude;
    };
    write(results_.grad_offset, 2 * index, grad_h);
    write(results_.grad_offset, 2 * index + 1, grad_w);
    write(results_.grad_mask, index, grad_mask);
  }

  // Adds what `column`, the masked sample of channel c, brings to the output and to the filters'
  // gradient. Returns its own gradient.
  Sum AddChannel(int64_t position, int64_t tap, int64_t c, const Sum& column) {
    const int64_t group = c / params_.group_in_channels();
    const int64_t in_group = c % params_.group_in_channels();
    const int64_t group_out = params_.group_out_channels();
    const int64_t filter =
        (tap * params_.group_in_channels() + in_group) * params_.out_channels + group * group_out;
    const int64_t out = position * params_.out_channels + group * group_out;
    const double* filters = problem_.filters.data() + filter;
    double* output = results_.output.values.data() + out;
    double* output_magnitude = results_.output.magnitudes.data() + out;
    for (int64_t o = 0; o < group_out; ++o) {
      output[o] += filters[o] * column.value;
      output_magnitude[o] += std::fabs(filters[o]) * column.magnitude;
    }
    Sum grad;
    if (!backward_) return grad;
    const double* grad_output = problem_.grad_output.data() + out;
    double* grad_filters = results_.grad_filters.values.data() + filter;
    double* grad_filters_magnitude = results_.grad_filters.magnitudes.data() + filter;
    for (int64_t o = 0; o < group_out; ++o) {
      grad_filters[o] += grad_output[o] * column.value;
      grad_filters_magnitude[o] += std::fabs(grad_output[o]) * column.magnitude;
    }
    for (int64_t o = 0; o < group_out; ++o) {
      grad.Add(filters[o] * grad_output[o], std::fabs(filters[o]) * std::fabs(grad_output[o]));
    }
    return grad;
  }

  const Problem& problem_;
  const DeformConvParams& params_;
  const bool backward_;
  Reference results_;
};

// The largest finite absolute value, or 1.
double LargestOf(const std::vector<double>& values) {
  double largest = 1;
  for (const double value : values) {
    const double size = std::fabs(value);
    if (size > largest && size <= DBL_MAX) largest = size;
  }
  return largest;
}

}  // namespace

Reference Compute(const Problem& problem, bool backward) { return Loop(problem, backward).Run(); }

Rounding RoundingOf(const Problem& problem) {
  // Every product of any of a value's factors is at most this.
  const double product = LargestOf(problem.input) * LargestOf(problem.filters) *
                         LargestOf(problem.mask) * LargestOf(problem.grad_output);
  const DeformConvParams& params = problem.params;
  const double terms =
      static_cast<double>(params.taps() * (params.in_channels + params.out_channels) +
                          params.out_positions() * params.taps());
  const Range range = RangeOf(problem.type), sums = RangeOf(OffsetTypeOf(problem.type));
  // What is stored in the element type between the passes: columns and their gradient.
  const double stored = std::max(LargestOf(problem.input) * LargestOf(problem.mask),
                                 static_cast<double>(params.group_out_channels()) *
                                     LargestOf(problem.filters) * LargestOf(problem.grad_output));
  Rounding rounding = {};
  rounding.result = problem.type;
  // The loop rounds too, in double.
  rounding.product_unit = range.unit + 0x1p-53;
  rounding.products = 12;
  rounding.sum_unit = sums.unit + 0x1p-53;
  rounding.may_overflow =
      std::max(product, LargestOf(problem.filters_before)) * terms > sums.largest / 16 ||
      stored > range.largest / 16;
  rounding.underflow = 8 * terms * sums.smallest * product;
  rounding.stored_underflow = range.smallest * product;
  return rounding;
}

bool NonFiniteAgree(double expected, double actual) {
  return !std::isfinite(expected) && !std::isfinite(actual);
}

std::string Compare(const char* name, const Expected& expected, const std::vector<double>& actual,
                    const std::vector<int64_t>& shape, const Rounding& rounding) {
  const double units =
      rounding.products * rounding.product_unit + (expected.additions + 4) * rounding.sum_unit;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double value = expected.values[i];
    // Of a magnitude that is not finite, nothing follows.
    const double bound = units * expected.magnitudes[i] + rounding.underflow +
                         (expected.additions + 4) * rounding.stored_underflow;
    bool right;
    if (std::isfinite(value) && std::isfinite(actual[i])) {
      right = std::fabs(actual[i] - value) <= bound || std::isnan(bound);
    } else if (NonFiniteAgree(value, actual[i])) {
      right = true;
    } else if (!std::isfinite(value)) {
      // The loop's own overflow in double says nothing.
      right = rounding.may_overflow && rounding.result == ElementType::kDouble;
    } else {
      right = rounding.may_overflow || std::fabs(value) > RangeOf(rounding.result).largest / 2;
    }
    if (right) continue;
    std::ostringstream message;
    message.precision(17);
    message << name << "[";
    int64_t below = static_cast<int64_t>(actual.size()), index = static_cast<int64_t>(i);
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      below /= shape[axis];
      message << (axis > 0 ? ", " : "") << index / below;
      index %= below;
    }
    message << "] is " << actual[i] << "; " << value << " +- " << bound << " expected";
    return message.str();
  }
  return "";
}

}  // namespace deform_conv::fuzz
