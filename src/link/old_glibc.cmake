# Lets the libraries run with glibc 2.27 and the C++ library of GCC 8, as wheels for manylinux must,
# though they are built with newer ones: for each newer symbol, an older version of it, or a
# definition of our own. scripts/build_wheel.sh checks that nothing newer is left.

# TensorFlow's headers include <condition_variable> and <memory>.
target_compile_options(common INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-include${CMAKE_CURRENT_LIST_DIR}/old_glibc.h>)
add_library(old_glibc OBJECT ${CMAKE_CURRENT_LIST_DIR}/old_glibc.cc)
target_compile_options(old_glibc PRIVATE -O3 ${warnings} ${hidden})
set(OLD_GLIBC_OBJECTS $<TARGET_OBJECTS:old_glibc>)

# The static CUDA runtime names no versions, and would be linked with the newest.
function(link_with_old_glibc library result)
  set(copy ${CMAKE_BINARY_DIR}/libcudart_static_old_glibc.a)
  set(symbols ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cudart_symbols.txt)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${symbols})
  execute_process(COMMAND ${CMAKE_OBJCOPY} --redefine-syms=${symbols} ${library} ${copy}
                  RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "objcopy could not copy ${library}")
  endif()
  # Where these functions were before glibc 2.34.
  set(${result} ${copy} -Wl,--push-state,--no-as-needed -l:libdl.so.2 -l:libpthread.so.0
      -l:librt.so.1 -Wl,--pop-state PARENT_SCOPE)
endfunction()
