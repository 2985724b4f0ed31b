// How the positions of a batch are cut where their columns are in a GPU's memory.

#ifndef DEFORM_CONV_CORE_GPU_CHUNK_PLAN_H_
#define DEFORM_CONV_CORE_GPU_CHUNK_PLAN_H_

#include <cstdint>

#include "core/params.h"

namespace deform_conv {

// Columns exist for one chunk of positions at a time. Backward, a chunk is a micro-batch of whole
// images, or a part of one image, so that the float sums of the input's gradient exist for one
// micro-batch at a time.
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
  int64_t stored;  // in tensors and columns
  int64_t summed;  // in the copy of the input's gradient that is summed up; 0 if there is none
};

// The positions of a chunk whose columns take at most `columns_bytes`, unless those of one position
// take more.
int64_t PositionsOfChunk(const DeformConvParams& params, int64_t stored_bytes,
                         int64_t columns_bytes);

ChunkPlan PlanBackward(const DeformConvParams& params, const ElementBytes& bytes,
                       int64_t columns_bytes, const ChunkPreference& preference);

// Bytes of the columns of so many positions.
int64_t ColumnsBytes(const DeformConvParams& params, int64_t positions, int64_t stored_bytes);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_CHUNK_PLAN_H_
