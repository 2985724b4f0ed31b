// Memory that the steps of a pass use one after the other.

#ifndef DEFORM_CONV_CORE_GPU_WORKSPACE_H_
#define DEFORM_CONV_CORE_GPU_WORKSPACE_H_

#include <cstdint>
#include <string>

#include "core/gpu/device.h"
#include "core/return_if_error.h"

namespace deform_conv {

// A device's memory lasts until the pass ends, so a step that asked the device would add to what
// the steps before hold. All steps are on the device's stream.
class Workspace {
 public:
  explicit Workspace(GpuDevice& device) : device_(device) {}

  // Gives a step at least so many bytes, aligned as the device's; the steps before are done with
  // them. Allocates only if no step before needed as many.
  std::string Reserve(int64_t bytes, void** memory) {
    if (bytes > bytes_) {
      void* more;
      DEFORM_CONV_RETURN_IF_ERROR(device_.Allocate(bytes, &more));
      memory_ = more;
      bytes_ = bytes;
    }
    *memory = memory_;
    return "";
  }

 private:
  GpuDevice& device_;
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_WORKSPACE_H_
