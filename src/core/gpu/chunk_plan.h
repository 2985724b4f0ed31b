// How a GPU cuts the positions of a batch into chunks, whose columns fit its memory.

#ifndef DEFORM_CONV_CORE_GPU_CHUNK_PLAN_H_
#define DEFORM_CONV_CORE_GPU_CHUNK_PLAN_H_

#include <cstdint>

#include "core/params.h"

namespace deform_conv {

// Columns exist for one chunk of positions at a time. Backward, a micro-batch is some whole images
// in one chunk, or one image in several chunks. The float sums of the input's gradient exist for
// one micro-batch at a time.
struct ChunkPlan {
  int64_t images;     // of a micro-batch
  int64_t positions;  // of a chunk; at least 1
};

// What an implementation of col2im asks of the chunks it works on.
struct ChunkPreference {
  // Chunks that are parts of an image best have a multiple of so many rows.
  int64_t rows = 1;
  // Whether a few images occupy the GPU, so that micro-batches may be small.
  bool few_images = false;
};

// What an element takes, in bytes.
struct ElementBytes {
  int64_t tensor;  // in tensors and columns
  int64_t sum;     // in the copy that the input's gradient is summed up in; 0 if there is none
};

// The chunk of forward: at most `columns_bytes` of columns, but at least one position.
int64_t PositionsOfChunk(const DeformConvParams& params, int64_t element_bytes,
                         int64_t columns_bytes);

// The chunks and micro-batches of backward, with the same bound.
ChunkPlan PlanBackward(const DeformConvParams& params, const ElementBytes& bytes,
                       int64_t columns_bytes, const ChunkPreference& preference);

// Cuts `number` into nearly equal parts of at most `most`, and returns their size; 1 for no number.
int64_t PartOf(int64_t number, int64_t most);

// Bytes of the columns of so many positions.
int64_t ColumnsBytes(const DeformConvParams& params, int64_t positions, int64_t element_bytes);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_CHUNK_PLAN_H_
