// What an exception of the core means to TensorFlow and XLA.

#ifndef DEFORM_CONV_TF_EXCEPTION_TO_STATUS_H_
#define DEFORM_CONV_TF_EXCEPTION_TO_STATUS_H_

#include <exception>
#include <new>
#include <stdexcept>

#include "absl/status/status.h"

namespace deform_conv {

// Calls work(), which returns a status, and turns an exception into one.
template <typename Work>
absl::Status ExceptionToStatus(const Work& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory for the op's workspace");
  } catch (const std::invalid_argument& error) {
    return absl::InvalidArgumentError(error.what());
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_EXCEPTION_TO_STATUS_H_
