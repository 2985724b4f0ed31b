// The lists of implementations. A new one is added here only.

#ifndef DEFORM_CONV_CORE_GPU_IMPLEMENTATIONS_H_
#define DEFORM_CONV_CORE_GPU_IMPLEMENTATIONS_H_

#include <cstdint>
#include <vector>

#include "core/deform_conv2d.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/device.h"
#include "core/gpu/implementation.h"
#include "core/gpu/workspace.h"
#include "core/params.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {

// --- Forward ---

template <typename T>
struct ForwardCall {
  const DeformConvParams& params;
  const SampledTensors<T, ComputeType<T>>& tensors;
  const T* filters;
  T* output;
  GpuDevice& device;
};

template <typename T>
const std::vector<Implementation<ForwardCall<T>>>& ForwardImplementations();

// --- Backward ---

template <typename T>
struct BackwardCall {
  const DeformConvParams& params;
  const SampledTensors<T, ComputeType<T>>& tensors;
  const T* filters;
  const T* grad_output;
  const DeformConvGradients<T, ComputeType<T>>& gradients;
  GpuDevice& device;
};

template <typename T>
const std::vector<Implementation<BackwardCall<T>>>& BackwardImplementations();

// --- Backward by columns: the columns alone, where only the filters' gradient is wanted ---

template <typename T>
struct Im2ColCall {
  const DeformConvParams& params;
  const SampledTensors<T, ComputeType<T>>& tensors;
  int64_t begin, end;  // positions
  T* columns;          // of these positions
  GpuDevice& device;
};

template <typename T>
const std::vector<Implementation<Im2ColCall<T>>>& Im2ColImplementations();

// --- Backward by columns: from the columns' gradient to those of input, offset and mask ---

template <typename T>
struct Col2ImCall {
  const DeformConvParams& params;
  const SampledTensors<T, ComputeType<T>>& tensors;
  int64_t begin, end;  // positions
  // The columns' gradient of these positions; with `replace`, the columns themselves afterwards.
  T* columns;
  bool replace;
  // The input's gradient is added to. Those of offset and mask are written, at these positions.
  SampledGradients<ComputeType<T>> gradients;
  GpuDevice& device;
  Workspace& workspace;
};

template <typename T>
struct Col2ImImplementation : Implementation<Col2ImCall<T>> {
  ChunkPreference chunks;
};

template <typename T>
const std::vector<Col2ImImplementation<T>>& Col2ImImplementations();

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_IMPLEMENTATIONS_H_
