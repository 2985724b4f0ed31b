// Ways to do one step of the computation on a GPU, and the choice among them.

#ifndef DEFORM_CONV_CORE_GPU_IMPLEMENTATION_H_
#define DEFORM_CONV_CORE_GPU_IMPLEMENTATION_H_

#include <string>

#include "core/gpu/device.h"

namespace deform_conv {

// `Call` is what the step is called with, and has the device as call.device.
template <typename Call>
struct Implementation {
  const char* name;
  KernelPath path;  // the path that it belongs to; kAny where it chooses within itself

  // Why it cannot do the call, or an empty string. Asked once for the whole batch; run() may then
  // be called for its parts. Looks only at whether pointers are null and aligned.
  std::string (*misfit)(const Call& call);

  // The implementation of lowest cost is chosen. Only the order of costs has a meaning.
  int (*cost)(const Call& call);

  // Does the call; returns an empty string, or what went wrong.
  std::string (*run)(const Call& call);
};

// Chooses the implementation of lowest cost among those of `list` that fit the call and that
// call.device.path() asks for. Returns an empty string, or that there is no such implementation for
// `what`, and why not.
template <typename List, typename Call>
std::string Choose(const List& list, const char* what, const Call& call,
                   const typename List::value_type** chosen) {
  const KernelPath path = call.device.path();
  std::string misfits;
  *chosen = nullptr;
  int lowest = 0;
  for (const auto& each : list) {
    if (path != KernelPath::kAny && each.path != KernelPath::kAny && each.path != path) continue;
    const int cost = each.cost(call);
    if (*chosen != nullptr && lowest <= cost) continue;
    const std::string misfit = each.misfit(call);
    if (!misfit.empty()) {
      misfits +=
          (misfits.empty() ? ": " : "; ") + std::string(each.name) + " cannot, since " + misfit;
      continue;
    }
    *chosen = &each;
    lowest = cost;
  }
  if (*chosen != nullptr) return "";
  if (misfits.empty()) misfits = ": this build has none";
  const char* kind = path == KernelPath::kFused     ? "fused "
                     : path == KernelPath::kGeneral ? "general "
                                                    : "";
  return std::string("no ") + kind + "kernel for the " + what +
         " of these sizes and types on this GPU" + misfits;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_IMPLEMENTATION_H_
