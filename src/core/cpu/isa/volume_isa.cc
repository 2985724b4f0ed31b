// The CPU's inner loops over volumes for one instruction set. Compiled once for each, as
// kernels_isa.cc, whose rules hold here too; apart from it, so that neither changes what the
// compiler makes of the other.

#ifndef DEFORM_CONV_ISA
#error "compile with -DDEFORM_CONV_ISA=<name of the instruction set>"
#endif

#include "core/cpu/isa/volume.h"
#include "core/cpu/volume_kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

template <typename T>
constexpr CpuVolumeKernels<T> kVolumeKernels = {LocateVolume<T>, VolumeIm2Col<T>,
                                                BackpropSampling<T>, VolumeScatter<T>};
extern const CpuVolumeKernels<float> kFloatVolumeKernels = kVolumeKernels<float>;
extern const CpuVolumeKernels<double> kDoubleVolumeKernels = kVolumeKernels<double>;

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv
