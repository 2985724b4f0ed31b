// Kinds of cases of the core's driver that have a file of their own.

#ifndef DEFORM_CONV_TESTS_FUZZ_CORE_KINDS_H_
#define DEFORM_CONV_TESTS_FUZZ_CORE_KINDS_H_

#include "problem.h"
#include "random.h"

namespace deform_conv::fuzz {

// What is drawn on the CPU.
constexpr Shaping kShaping = {/*work=*/1, /*eights=*/false, /*without_filters=*/0.2};

// Wrong sizes, unknown sizes and numbers of any size.
void RunSizes(Random& random);

// Conversions from and to native form.
void RunLayout(Random& random);

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_CORE_KINDS_H_
