// Stands in for LLVM's header, which the headers of TensorFlow 2.19 include and do not bring along:
// just enough for the declarations that name these types. Nothing here may be used.

#ifndef DEFORM_CONV_TF_LLVM_STUBS_LLVM_ADT_ARRAYREF_H_
#define DEFORM_CONV_TF_LLVM_STUBS_LLVM_ADT_ARRAYREF_H_

#include "llvm/ADT/SmallVector.h"

namespace llvm {

template <typename T>
struct ArrayRef {
  ArrayRef(const SmallVector<T>&) {}
};

}  // namespace llvm

#endif  // DEFORM_CONV_TF_LLVM_STUBS_LLVM_ADT_ARRAYREF_H_
