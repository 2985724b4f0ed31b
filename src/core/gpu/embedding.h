// A layer within a larger one, whose channels tensor cores take. benchmarks/gpu_kernels.md explains
// it.

#ifndef DEFORM_CONV_CORE_GPU_EMBEDDING_H_
#define DEFORM_CONV_CORE_GPU_EMBEDDING_H_

#include <cstdint>

#include "core/params.h"

namespace deform_conv {

// The larger layer computes what the layer does, where
//
//   - neighbouring convolution groups are merged into one, with filters of 0 between channels that
//     were of different groups;
//   - each run of input channels is padded with channels of 0. A run lies within a merged and
//     within a deformable group. All are of one length;
//   - the output channels of each merged group are padded, with filters of 0.
struct Embedding {
  DeformConvParams layer, larger;
  int64_t in_runs;  // of input channels

  bool merges_groups() const { return larger.groups != layer.groups; }
  bool pads_input() const { return larger.in_channels != layer.in_channels; }
  bool pads_output() const { return larger.out_channels != layer.out_channels; }
  // Whether tensors of the larger layer are at most half as large again.
  bool pads_little() const {
    return 2 * larger.in_channels <= 3 * layer.in_channels &&
           2 * larger.out_channels <= 3 * layer.out_channels;
  }
  bool changes_nothing() const { return !merges_groups() && !pads_input() && !pads_output(); }
};

// Numbers of channels that kernels take, or prefer. `slice` is a multiple of `in_vector`.
struct ChannelAims {
  int64_t in_vector;   // convolution and deformable groups have multiples of it
  int64_t out_vector;  // convolution groups have multiples of it
  int64_t group;       // a convolution group best has about as many input channels
  int64_t slice;       // convolution and deformable groups best have multiples of it, if
  double most_growth;  // padding to it from in_vector makes at most so many times as many
};

// Merges groups that are narrower than `aims.group`, and pads channels. For the same aims, the
// larger layer needs no embedding.
Embedding EmbeddingOf(const DeformConvParams& layer, const ChannelAims& aims);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_EMBEDDING_H_
