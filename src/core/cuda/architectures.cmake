# Settles whether there are CUDA kernels, and for which compute capabilities:
#   DEFORM_CONV_CUDA          ON or OFF
#   CMAKE_CUDA_ARCHITECTURES  what CMake builds for
#   FUSED_ARCHITECTURES       those with kernels in their own instructions

set(DEFAULT_ARCHS 75 80 86 89 90 100 120)

if(DEFINED ENV{CUDACXX} AND DEFORM_CONV_CUDA)
  find_program(NVCC NAMES "$ENV{CUDACXX}")
  if(NOT NVCC)
    message(FATAL_ERROR "CUDACXX: $ENV{CUDACXX} not found")
  endif()
endif()
find_program(NVCC NAMES nvcc)
if(DEFORM_CONV_CUDA STREQUAL AUTO)
  set(DEFORM_CONV_CUDA OFF)
  set(cuda_text "no CUDA (nvcc not found)")
  if(NVCC)
    set(DEFORM_CONV_CUDA ON)
  endif()
elseif(NOT DEFORM_CONV_CUDA)
  set(cuda_text "no CUDA")
elseif(NOT NVCC)
  message(FATAL_ERROR "DEFORM_CONV_CUDA is ON, and nvcc is not found; set CUDACXX to it")
endif()

if(DEFORM_CONV_CUDA)
  set(CMAKE_CUDA_COMPILER ${NVCC})
  execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE text)
  string(REGEX MATCH "release ([0-9.]+)" text "${text}")
  set(nvcc_version ${CMAKE_MATCH_1})
  execute_process(COMMAND ${NVCC} --list-gpu-arch OUTPUT_VARIABLE text)
  string(REGEX MATCHALL "[0-9]+" known "${text}")

  # Of the usual ones those that this nvcc knows, or exactly what the user asks for.
  string(REGEX MATCHALL "[^ ;,]+" asked "${DEFORM_CONV_CUDA_ARCHS}")
  if(asked)
    foreach(architecture ${asked})
      if(NOT architecture IN_LIST known)
        message(FATAL_ERROR "CUDA_ARCHS: nvcc does not know compute capability ${architecture}; "
                            "it knows ${known}")
      endif()
    endforeach()
    set(architectures ${asked})
  else()
    set(architectures)
    foreach(architecture ${DEFAULT_ARCHS})
      if(architecture IN_LIST known)
        list(APPEND architectures ${architecture})
      endif()
    endforeach()
  endif()
  list(JOIN architectures " " text)
  set(cuda_text "CUDA ${nvcc_version} for ${text}")

  # The last is included as PTX too, which later GPUs can run.
  list(POP_BACK architectures newest)
  list(TRANSFORM architectures APPEND -real OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest})

  # The first CUDA that knows the instructions of 9.0a is 12.0.
  set(FUSED_ARCHITECTURES)
  if(90 IN_LIST architectures OR newest EQUAL 90)
    if(nvcc_version VERSION_GREATER_EQUAL 12.0)
      list(APPEND FUSED_ARCHITECTURES 90)
    else()
      string(APPEND cuda_text ", without the fused kernels, which need CUDA 12")
    endif()
  endif()
endif()
message(STATUS "deform_conv: ${cuda_text}")
