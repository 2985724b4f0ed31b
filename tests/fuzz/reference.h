// The formula of the operator as a loop over all of its terms, and how far a result may be from it.

#ifndef DEFORM_CONV_TESTS_FUZZ_REFERENCE_H_
#define DEFORM_CONV_TESTS_FUZZ_REFERENCE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "problem.h"

namespace deform_conv::fuzz {

// --- The loop ---

// One tensor, as the formula gives it in double.
struct Expected {
  std::vector<double> values;
  // The sum of the absolute values of all products that a value is the sum of. Rounding errors are
  // multiples of this. Where a fraction of an offset has to be rounded, it is that much larger.
  std::vector<double> magnitudes;
  // The most additions that any value takes.
  double additions = 0;
};

struct Reference {
  Expected output, grad_input, grad_filters, grad_offset, grad_mask;
};

// With `backward`, the gradients too.
Reference Compute(const Problem& problem, bool backward);

// --- The comparison ---

// How an implementation rounds.
struct Rounding {
  ElementType result;   // what the result is stored in
  double product_unit;  // largest relative error of a rounded factor or product
  double products;      // how many of those follow each other
  double sum_unit;      // largest relative error of an addition
  // Whether factors, products or sums of the problem may overflow though the result does not.
  bool may_overflow;
  // What underflowing products are off by: all of one value together, and those that are stored in
  // 16 bits, for each addition.
  double underflow, stored_underflow;
};

// Of computing in the type itself, or of computing in float and storing columns in 16 bits.
Rounding RoundingOf(const Problem& problem);

// Whether `actual` is right where the formula gives infinity or NaN: it must not be finite.
// Compute() holds the rule for where that is.
//
// Corners outside the image have no part in a sample. Those inside do, even with weight 0, so that
// 0 * inf = NaN. Which of the non-finite values it is depends on rounding and on the order of
// multiplications: 0 * inf + 1 * inf is not (0 + 1) * inf, and the sign of a sum near 0 is not
// sure.
bool NonFiniteAgree(double expected, double actual);

// Returns an empty string, or which element is wrong. `shape` is for the message.
std::string Compare(const char* name, const Expected& expected, const std::vector<double>& actual,
                    const std::vector<int64_t>& shape, const Rounding& rounding);

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_REFERENCE_H_
