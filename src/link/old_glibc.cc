// Our own definitions of what glibc and the C++ library have only had for some years: see
// old_glibc.cmake. exports.map keeps them from other libraries.

#include <new>
#include <sstream>

// From glibc 2.32 on: whether the process has one thread. The C++ library reads it to leave atomic
// instructions out. TensorFlow has threads, so "no" costs nothing.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace std {

// From GCC 11 on: what operator new[] calls.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// From GCC 9 on: the C++ library's own copy, which the compiler calls where it does not inline it.
template basic_stringstream<char>::basic_stringstream();

}  // namespace std
