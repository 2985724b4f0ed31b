# The program that tries the core with random problems:
#   cmake --build <folder> --target fuzz_core
# CMakeLists.txt includes this where DEFORM_CONV_FUZZ is set; then the core is compiled with the
# sanitizers too. gpu.py builds the program for a GPU.

set(fuzz_dir ${CMAKE_CURRENT_LIST_DIR})
set(fuzz_flags)
if(NOT DEFORM_CONV_FUZZ STREQUAL none)
  set(fuzz_flags -fsanitize=${DEFORM_CONV_FUZZ})
  if(DEFORM_CONV_FUZZ MATCHES undefined)
    list(APPEND fuzz_flags -fsanitize=float-cast-overflow -fno-sanitize-recover=all)
  endif()
  # Quick to compile. Checks make compilers see uses of uninitialised values where there are none.
  target_compile_options(common INTERFACE ${fuzz_flags} -O1 -g1 -fno-omit-frame-pointer
                         -Wno-maybe-uninitialized -Wno-uninitialized)
endif()

# What the program for a GPU has too. Not slowed down by sanitizers.
add_library(fuzz_common OBJECT EXCLUDE_FROM_ALL ${fuzz_dir}/driver.cc ${fuzz_dir}/problem.cc
            ${fuzz_dir}/reference.cc)
target_include_directories(fuzz_common PRIVATE src ${fuzz_dir})
target_compile_options(fuzz_common PRIVATE ${warnings} -O3)

add_executable(fuzz_core EXCLUDE_FROM_ALL ${fuzz_dir}/core.cc ${fuzz_dir}/core_layout.cc
               ${fuzz_dir}/core_sizes.cc ${fuzz_dir}/allocations.cc $<TARGET_OBJECTS:fuzz_common>
               $<TARGET_OBJECTS:core> ${CPU_KERNEL_OBJECTS})
target_include_directories(fuzz_core PRIVATE src ${fuzz_dir})
target_compile_options(fuzz_core PRIVATE ${warnings} ${fuzz_flags} -O2 -g1)
target_link_options(fuzz_core PRIVATE ${fuzz_flags})
target_link_libraries(fuzz_core PRIVATE Threads::Threads)
