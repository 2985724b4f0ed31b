#include "core/gpu/im2col_gemm.h"

#include <algorithm>

#include "core/cuda/general/kernels.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/gemm.h"
#include "core/return_if_error.h"

namespace deform_conv {

template <typename T>
std::string Im2ColGemm(const ForwardCall<T>& call) {
  const DeformConvParams& params = call.params;
  const int64_t positions = params.out_positions();
  if (positions == 0) return "";
  const int64_t chunk = PositionsOfChunk(params, sizeof(T), call.device.columns_bytes());
  T* columns;
  DEFORM_CONV_RETURN_IF_ERROR(call.device.Allocate(ColumnsBytes(params, chunk, sizeof(T)),
                                                   reinterpret_cast<void**>(&columns)));
  for (int64_t begin = 0; begin < positions; begin += chunk) {
    const int64_t end = std::min(begin + chunk, positions);
    DEFORM_CONV_RETURN_IF_ERROR(
        cuda::Im2Col<T>(params, call.tensors, begin, end, columns, call.device.stream()));
    DEFORM_CONV_RETURN_IF_ERROR(GemmOfGroups(
        params, call.device, GemmForm::kPlain, ColumnsOfGroups(params, columns, end - begin),
        FiltersOfGroups(params, call.filters), OutputOfGroups(params, call.output, begin, end),
        /*accumulate=*/false));
  }
  return "";
}

#define DEFORM_CONV_INSTANTIATE(T) template std::string Im2ColGemm<T>(const ForwardCall<T>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
