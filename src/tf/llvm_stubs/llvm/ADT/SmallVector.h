// See ArrayRef.h.

#ifndef DEFORM_CONV_TF_LLVM_STUBS_LLVM_ADT_SMALLVECTOR_H_
#define DEFORM_CONV_TF_LLVM_STUBS_LLVM_ADT_SMALLVECTOR_H_

namespace llvm {

template <typename T>
struct SmallVector {};

}  // namespace llvm

#endif  // DEFORM_CONV_TF_LLVM_STUBS_LLVM_ADT_SMALLVECTOR_H_
