// Memory for work that is done again and again, such as on one part of a batch after the other.

#ifndef DEFORM_CONV_CORE_GPU_REPEATING_DEVICE_H_
#define DEFORM_CONV_CORE_GPU_REPEATING_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/gpu/device.h"
#include "core/return_if_error.h"

namespace deform_conv {

// A device that gives out the same memory after each Repeat(), since the work on its stream is done
// in turn.
class RepeatingDevice : public GpuDevice {
 public:
  explicit RepeatingDevice(GpuDevice& device) : device_(device) {}

  // All memory may be given out again.
  void Repeat() { next_ = 0; }

  void* stream() override { return device_.stream(); }
  int64_t columns_bytes() const override { return device_.columns_bytes(); }
  bool deterministic() const override { return device_.deterministic(); }
  bool allow_tf32() const override { return device_.allow_tf32(); }
  KernelPath path() const override { return device_.path(); }

  std::string Allocate(int64_t bytes, void** memory) override {
    if (next_ == blocks_.size()) blocks_.push_back({});
    Block& block = blocks_[next_];
    if (block.memory == nullptr || block.bytes < bytes) {
      DEFORM_CONV_RETURN_IF_ERROR(device_.Allocate(bytes, &block.memory));
      block.bytes = bytes;
    }
    *memory = block.memory;
    ++next_;
    return "";
  }

  std::string Gemm(ElementType type, GemmForm form, int64_t count, const MatrixBatch<const void>& a,
                   const MatrixBatch<const void>& b, const MatrixBatch<void>& c,
                   bool accumulate) override {
    return device_.Gemm(type, form, count, a, b, c, accumulate);
  }

 private:
  struct Block {
    void* memory;
    int64_t bytes;
  };

  GpuDevice& device_;
  std::vector<Block> blocks_;  // in the order in which they are asked for
  size_t next_ = 0;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_REPEATING_DEVICE_H_
