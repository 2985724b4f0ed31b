#include "core/gpu/chunk_plan.h"

#include <algorithm>

#include "core/integer_math.h"

namespace deform_conv {
namespace {

int64_t MostPositions(const DeformConvParams& params, int64_t element_bytes,
                      int64_t columns_bytes) {
  return std::max<int64_t>(columns_bytes / ColumnsBytes(params, 1, element_bytes), 1);
}

// The images of a micro-batch where a few occupy the GPU. Their columns and float sums take less
// than the columns of the whole batch would. All images where everything is small, since each
// micro-batch costs launches; and where that takes no more than the float sums of the filters'
// gradient, which several micro-batches need.
int64_t MostImages(const DeformConvParams& params, const ElementBytes& bytes) {
  constexpr int64_t kFew = 64, kSmallBytes = int64_t{32} << 20;
  const int64_t columns = ColumnsBytes(params, params.image_positions(), bytes.tensor);
  const int64_t sums = params.image_size() * bytes.sum, image = columns + sums;
  if (params.batch * image <= kSmallBytes) return params.batch;
  const int64_t images = std::clamp<int64_t>(params.batch * columns / image, 1, kFew);
  return (params.batch - images) * image <= params.filters_size() * bytes.sum ? params.batch
                                                                              : images;
}

}  // namespace

int64_t PartOf(int64_t number, int64_t most) {
  return number == 0 ? 1 : CeilDiv(number, CeilDiv(number, most));
}

int64_t ColumnsBytes(const DeformConvParams& params, int64_t positions, int64_t element_bytes) {
  return positions * params.taps() * params.in_channels * element_bytes;
}

int64_t PositionsOfChunk(const DeformConvParams& params, int64_t element_bytes,
                         int64_t columns_bytes) {
  return PartOf(params.out_positions(), MostPositions(params, element_bytes, columns_bytes));
}

ChunkPlan PlanBackward(const DeformConvParams& params, const ElementBytes& bytes,
                       int64_t columns_bytes, const ChunkPreference& preference) {
  const int64_t image = params.image_positions();
  const int64_t most = MostPositions(params, bytes.tensor, columns_bytes);
  if (image <= most) {
    int64_t most_images = image == 0 ? params.batch : most / image;
    if (preference.few_images) most_images = std::min(most_images, MostImages(params, bytes));
    const int64_t images = PartOf(params.batch, most_images);
    return {images, std::max<int64_t>(images * image, 1)};
  }
  const int64_t band = preference.rows * params.out_w;
  const int64_t step = preference.rows > 1 && band <= most ? band : 1;
  return {1, PartOf(CeilDiv(image, step), most / step) * step};
}

}  // namespace deform_conv
