// Included before everything else in a build for an older glibc: see old_glibc.cmake.

// The version that GCC 12 brought, GLIBCXX_3.4.30, only adds noexcept.
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
