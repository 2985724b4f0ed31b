#include "core/cpu/kernels.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/cpu/volume_kernels.h"

namespace deform_conv {

#define DEFORM_CONV_DECLARE_ISA(isa)                          \
  namespace isa {                                             \
  extern const CpuKernels<float> kFloatKernels;               \
  extern const CpuKernels<double> kDoubleKernels;             \
  extern const CpuVolumeKernels<float> kFloatVolumeKernels;   \
  extern const CpuVolumeKernels<double> kDoubleVolumeKernels; \
  extern const CpuLayoutKernels<float> kFloatLayout;          \
  extern const CpuLayoutKernels<double> kDoubleLayout;        \
  extern const CpuLayoutKernels<Half> kHalfLayout;            \
  extern const CpuLayoutKernels<BFloat16> kBFloat16Layout;    \
  }

DEFORM_CONV_DECLARE_ISA(baseline)
#ifdef DEFORM_CONV_X86
DEFORM_CONV_DECLARE_ISA(avx2)
DEFORM_CONV_DECLARE_ISA(avx512)
#endif
#undef DEFORM_CONV_DECLARE_ISA

namespace {

enum Isa { kBaseline, kAvx2, kAvx512, kIsaCount };
constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512"};

Isa BestIsa() {
#ifdef DEFORM_CONV_X86
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C too, which Clang before 17 cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

// Throws std::invalid_argument, at every call, if the environment names another set.
Isa ChosenIsa() {
  static const Isa chosen = [] {
    const Isa best = BestIsa();
    const char* value = std::getenv("DEFORM_CONV_CPU_ISA");
    const std::string asked = value == nullptr ? "" : value;
    if (asked.empty()) return best;
    for (int isa = kBaseline; isa < kIsaCount; ++isa) {
      if (asked == kIsaNames[isa]) return std::min(static_cast<Isa>(isa), best);
    }
    throw std::invalid_argument(
        "DEFORM_CONV_CPU_ISA must be \"baseline\", \"avx2\", \"avx512\" or unset; received \"" +
        asked + "\"");
  }();
  return chosen;
}

// Picks the chosen set's entry of a table with one per set.
template <typename Kernels>
const Kernels& Choose(const Kernels* const (&table)[kIsaCount]) {
  return *table[ChosenIsa()];
}

}  // namespace

const char* CpuInstructionSet() { return kIsaNames[ChosenIsa()]; }

#ifdef DEFORM_CONV_X86
#define DEFORM_CONV_TABLE(kernels) {&baseline::kernels, &avx2::kernels, &avx512::kernels}
#else
#define DEFORM_CONV_TABLE(kernels) {&baseline::kernels, nullptr, nullptr}
#endif

#define DEFORM_CONV_DEFINE_SELECT(Select, Type, kernels)                         \
  template <>                                                                    \
  const Type& Select() {                                                         \
    static constexpr const Type* kTable[kIsaCount] = DEFORM_CONV_TABLE(kernels); \
    return Choose(kTable);                                                       \
  }

DEFORM_CONV_DEFINE_SELECT(SelectCpuKernels<float>, CpuKernels<float>, kFloatKernels)
DEFORM_CONV_DEFINE_SELECT(SelectCpuKernels<double>, CpuKernels<double>, kDoubleKernels)
DEFORM_CONV_DEFINE_SELECT(SelectCpuVolumeKernels<float>, CpuVolumeKernels<float>,
                          kFloatVolumeKernels)
DEFORM_CONV_DEFINE_SELECT(SelectCpuVolumeKernels<double>, CpuVolumeKernels<double>,
                          kDoubleVolumeKernels)
DEFORM_CONV_DEFINE_SELECT(SelectCpuLayoutKernels<float>, CpuLayoutKernels<float>, kFloatLayout)
DEFORM_CONV_DEFINE_SELECT(SelectCpuLayoutKernels<double>, CpuLayoutKernels<double>, kDoubleLayout)
DEFORM_CONV_DEFINE_SELECT(SelectCpuLayoutKernels<Half>, CpuLayoutKernels<Half>, kHalfLayout)
DEFORM_CONV_DEFINE_SELECT(SelectCpuLayoutKernels<BFloat16>, CpuLayoutKernels<BFloat16>,
                          kBFloat16Layout)

}  // namespace deform_conv
