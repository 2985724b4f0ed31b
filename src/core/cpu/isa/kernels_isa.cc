// The CPU's inner loops for one instruction set. Compiled once for each, with
//   -DDEFORM_CONV_ISA=<name>  and the compiler flags that enable the set.
//
// The linker keeps one copy of an inline function that several objects hold, perhaps the one for
// the newest processors. So nothing here may be shared: own code and Eigen lie in a namespace per
// set, and what is included from elsewhere is always inlined. A test looks at the objects.

#ifndef DEFORM_CONV_ISA
#error "compile with -DDEFORM_CONV_ISA=<name of the instruction set>"
#endif

#define DEFORM_CONV_CONCAT_(a, b) a##b
#define DEFORM_CONV_CONCAT(a, b) DEFORM_CONV_CONCAT_(a, b)
#define Eigen DEFORM_CONV_CONCAT(Eigen_, DEFORM_CONV_ISA)

#include "core/cpu/isa/col2im.h"
#include "core/cpu/isa/direct.h"
#include "core/cpu/isa/gemm.h"
#include "core/cpu/isa/im2col.h"
#include "core/cpu/isa/layout.h"
#include "core/cpu/isa/locate.h"
#include "core/cpu/kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

template <typename T>
constexpr CpuKernels<T> kKernels = {
    kRows,     kPanel<T>, kLanes<T>,         Locate<T>, SampledRows<T>,   Im2Col<T>,
    Col2Im<T>, Pack<T>,   PackTransposed<T>, Gemm<T>,   DirectForward<T>, DirectBackward<T>};
extern const CpuKernels<float> kFloatKernels = kKernels<float>;
extern const CpuKernels<double> kDoubleKernels = kKernels<double>;
extern const CpuLayoutKernels<float> kFloatLayout = {ToNative<float, float>,
                                                     FromNative<float, float>};
extern const CpuLayoutKernels<double> kDoubleLayout = {ToNative<double, double>,
                                                       FromNative<double, double>};
extern const CpuLayoutKernels<Half> kHalfLayout = {ToNative<Half, float>, FromNative<Half, float>};
extern const CpuLayoutKernels<BFloat16> kBFloat16Layout = {ToNative<BFloat16, float>,
                                                           FromNative<BFloat16, float>};

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv
