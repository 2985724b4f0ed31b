// Which implementations the environment asks for.

#ifndef DEFORM_CONV_TF_KERNEL_PATH_H_
#define DEFORM_CONV_TF_KERNEL_PATH_H_

#include <cstdlib>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "core/gpu/device.h"

namespace deform_conv {

// What the environment variable DEFORM_CONV_PATH may say.
struct NamedPath {
  const char* name;
  KernelPath path;
};
constexpr NamedPath kNamedPaths[] = {
    {"general", KernelPath::kGeneral},
    {"fused", KernelPath::kFused},
};

// The path that the variable named when first read. Unset or empty is kAny; anything else is
// InvalidArgument.
inline const absl::StatusOr<KernelPath>& PathOfEnvironment() {
  static const absl::StatusOr<KernelPath> path = []() -> absl::StatusOr<KernelPath> {
    const char* value = std::getenv("DEFORM_CONV_PATH");
    const std::string name = value == nullptr ? "" : value;
    if (name.empty()) return KernelPath::kAny;
    std::string allowed;
    for (const NamedPath& named : kNamedPaths) {
      if (name == named.name) return named.path;
      absl::StrAppend(&allowed, "\"", named.name, "\", ");
    }
    return absl::InvalidArgumentError(
        absl::StrCat("DEFORM_CONV_PATH must be ", allowed, "or unset; received \"", name, "\""));
  }();
  return path;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_KERNEL_PATH_H_
