// Tensors in native form, which the core computes on, some images at a time.

#ifndef DEFORM_CONV_TF_NATIVE_TENSOR_H_
#define DEFORM_CONV_TF_NATIVE_TENSOR_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/types.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace deform_conv {

// TensorFlow's element types as the core names them.
template <typename TfT>
struct CoreTypeOf {
  using type = TfT;
};
template <>
struct CoreTypeOf<Eigen::half> {
  using type = Half;
};
template <>
struct CoreTypeOf<Eigen::bfloat16> {
  using type = BFloat16;
};
template <typename TfT>
using CoreType = typename CoreTypeOf<TfT>::type;

// A tensor's own elements where they are in native form, or else a converted copy. Without a
// tensor, data() is null and the rest does nothing.
template <typename Backend, typename T, typename NativeT>
class NativeTensor {
 public:
  NativeTensor(tensorflow::OpKernelContext* context, Backend& backend, DataFormat format)
      : context_(context), backend_(backend), format_(format) {}

  // `tensor`, with any number of spatial axes, must outlive this object.
  void Attach(const tensorflow::Tensor& tensor) {
    tensor_ = reinterpret_cast<T*>(const_cast<char*>(tensor.tensor_data().data()));
    const int channels = format_ == DataFormat::kNhwc ? tensor.dims() - 1 : 1;
    extent_ = {tensor.dim_size(0), 1, tensor.dim_size(channels)};
    for (int i = 1; i < tensor.dims(); ++i) {
      if (i != channels) extent_.pixels *= tensor.dim_size(i);
    }
    native_ = std::is_same_v<T, NativeT> && format_ == DataFormat::kNhwc;
  }

  int64_t images() const { return extent_.batch; }
  // What the copy of an image takes.
  int64_t copy_bytes() const {
    return tensor_ == nullptr || native_ ? 0 : ImageSize() * static_cast<int64_t>(sizeof(NativeT));
  }

  // Makes room for so many images at a time.
  absl::Status Allocate(int64_t images) {
    if (copy_bytes() == 0) return absl::OkStatus();
    return context_->allocate_temp(tensorflow::DT_INT8,
                                   tensorflow::TensorShape({images * copy_bytes()}), &copy_);
  }

  // Chooses images [begin, begin + count), at most as many as there is room for.
  void MoveTo(int64_t begin, int64_t count) {
    begin_ = begin;
    extent_.batch = count;
  }

  // Converts the chosen images into native form.
  absl::Status Read() {
    if (copy_bytes() == 0) return absl::OkStatus();
    return backend_.ToNative(format_, extent_, Chosen(), data());
  }

  // Converts them back.
  absl::Status Write() {
    if (copy_bytes() == 0) return absl::OkStatus();
    return backend_.FromNative(format_, extent_, data(), Chosen());
  }

  // The chosen images in native form.
  NativeT* data() const {
    if (tensor_ == nullptr) return nullptr;
    if constexpr (std::is_same_v<T, NativeT>) {
      if (native_) return Chosen();
    }
    return reinterpret_cast<NativeT*>(const_cast<char*>(copy_.tensor_data().data()));
  }

 private:
  int64_t ImageSize() const { return extent_.pixels * extent_.channels; }
  T* Chosen() const { return tensor_ + begin_ * ImageSize(); }

  tensorflow::OpKernelContext* context_;
  Backend& backend_;
  DataFormat format_;
  T* tensor_ = nullptr;
  TensorExtent extent_{0, 0, 0};  // of the chosen images
  int64_t begin_ = 0;
  bool native_ = false;
  tensorflow::Tensor copy_;
};

// Calls work(begin, count) for ranges of images that cover the batch, after making room for one in
// `tensors`. A range is as long as the backend grants memory to the tensors' copies, but at least
// one image.
template <typename Backend, typename Work, typename... Tensors>
absl::Status ForEachRange(const Backend& backend, int64_t images, const Work& work,
                          Tensors&... tensors) {
  const int64_t bytes = (tensors.copy_bytes() + ...);
  const int64_t granted = bytes == 0 ? images : std::min(backend.copy_bytes() / bytes, images);
  const int64_t range = std::max<int64_t>(granted, 1);
  absl::Status status;
  const auto allocate = [&](auto& tensor) {
    if (status.ok()) status = tensor.Allocate(std::min(range, images));
  };
  (allocate(tensors), ...);
  int64_t begin = 0;
  do {  // once for an empty batch too: it has a gradient by the filters
    if (!status.ok()) break;
    const int64_t count = std::min(range, images - begin);
    (tensors.MoveTo(begin, count), ...);
    status = work(begin, count);
    begin += range;
  } while (begin < images);
  return status;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_NATIVE_TENSOR_H_
