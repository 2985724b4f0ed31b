#include "core/gpu/embedding.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "core/integer_math.h"

namespace deform_conv {
namespace {

// How many groups to merge such that they have about `aims.group` input channels. Tensor cores
// multiply with the zeros between them, so neither in nor out may they have far more.
int64_t MergedGroups(const DeformConvParams& layer, const ChannelAims& aims) {
  const int64_t channels = layer.group_in_channels();
  const int64_t widest = std::max(channels, layer.group_out_channels());
  int64_t best = 1;
  for (int64_t merged = 2; merged <= layer.groups && merged * widest <= 2 * aims.group; ++merged) {
    const auto distance = [&](int64_t groups) { return std::abs(groups * channels - aims.group); };
    if (layer.groups % merged == 0 && distance(merged) < distance(best)) best = merged;
  }
  return best;
}

int64_t PaddedRun(int64_t channels, const ChannelAims& aims) {
  const int64_t vectors = RoundUp(channels, aims.in_vector);
  const int64_t slices = RoundUp(vectors, aims.slice);
  return slices <= aims.most_growth * vectors ? slices : vectors;
}

}  // namespace

Embedding EmbeddingOf(const DeformConvParams& layer, const ChannelAims& aims) {
  constexpr int64_t kFewest = 3;  // fewer are read as fast one by one
  const int64_t merged = MergedGroups(layer, aims);
  const int64_t run = std::gcd(merged * layer.group_in_channels(), layer.deform_group_channels());
  const int64_t padded_run = PaddedRun(run, aims);
  Embedding embedding = {layer, layer, layer.in_channels / run};
  if (run < kFewest) return embedding;
  DeformConvParams& larger = embedding.larger;
  larger.groups /= merged;
  larger.in_channels = embedding.in_runs * padded_run;
  larger.out_channels =
      larger.groups * RoundUp(merged * layer.group_out_channels(), aims.out_vector);
  return embedding;
}

}  // namespace deform_conv
