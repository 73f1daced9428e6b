# The modules of CUDA kernels: `_cuda`, compiled by nvcc, and `_cuda_emulated`, the same sources
# compiled for an interpreter of CUDA on the CPU.

# Those that take long, longest first.
set(PYMPA_CUDA_SOURCES csrc/ops/attention_rows_bfloat16_cuda.cu
                       csrc/ops/attention_rows_float16_cuda.cu csrc/ops/attention_decode_cuda.cu)
set(PYMPA_SMALL_CUDA_SOURCES
    csrc/ops/attention_cuda.cu
    csrc/ops/attention_scores_cuda.cu
    csrc/ops/attention_state_cuda.cu
    csrc/ops/copy_cuda.cu
    csrc/ops/elementwise_cuda.cu
    csrc/ops/experts_cuda.cu
    csrc/ops/experts_routing_cuda.cu
    csrc/ops/gather_cuda.cu
    csrc/ops/linear_cuda.cu
    csrc/ops/norm_cuda.cu
    csrc/ops/rope_cuda.cu
    csrc/ops/select_experts_cuda.cu)

if(PYMPA_CUDA STREQUAL AUTO)
  include(CheckLanguage)
  check_language(CUDA)
  set(build_cuda ${CMAKE_CUDA_COMPILER})
else()
  set(build_cuda ${PYMPA_CUDA})
endif()

if(build_cuda)
  # By default Ampere and Hopper, and code for later GPUs that the driver compiles. All come from one
  # PTX: the front end takes a third of the time, and makes the same for Hopper, but for how it
  # widens bfloat16.
  set(CMAKE_CUDA_ARCHITECTURES OFF CACHE STRING
      "GPUs that CUDA kernels are compiled for; OFF for sm_80, sm_90a and PTX")
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  enable_language(CUDA)
  pympa_join(small_source small_cuda.cu ${PYMPA_SMALL_CUDA_SOURCES})
  pympa_add_module(_cuda KERNELS ${PYMPA_CUDA_SOURCES} ${small_source}
                   BINDINGS csrc/bindings/register_cuda.cpp
                   OPS csrc/ops/copy.cpp csrc/cuda/cublaslt.cpp csrc/cuda/gemm_cublaslt.cpp)
  target_compile_definitions(_cuda PRIVATE PYMPA_CUDA_KERNELS)
  find_package(CUDAToolkit REQUIRED)  # its headers, for C++ sources too
  target_include_directories(_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  # cuBLASLt is loaded at the first product, so that importing needs no GPU library. Where there is
  # its header, what csrc declares of it is held against it.
  target_link_libraries(_cuda PRIVATE ${CMAKE_DL_LIBS})
  find_path(PYMPA_CUBLASLT_INCLUDE cublasLt.h HINTS ${CUDAToolkit_INCLUDE_DIRS}
            PATHS ${Python_SITELIB}/nvidia/cu13/include ${Python_SITELIB}/nvidia/cublas/include)
  if(PYMPA_CUBLASLT_INCLUDE)
    add_library(pympa_cublaslt_check OBJECT csrc/cuda/cublaslt_check.cpp)
    target_include_directories(pympa_cublaslt_check SYSTEM PRIVATE ${PYMPA_CUBLASLT_INCLUDE}
                               ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(pympa_cublaslt_check PRIVATE pympa_options)
  endif()
  # As on the CPU, contraction is spelled out in the code.
  target_compile_options(
    _cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -fmad=false
                  -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter>)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(one_ptx --generate-code=arch=compute_80,code=[compute_80,sm_80,sm_90a])
    target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${one_ptx}>)
  endif()
  if(PYMPA_WERROR)
    target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xptxas=-v>)
  endif()
endif()

if(PYMPA_CUDA_EMULATED)
  pympa_join(small_emulated emulated/small_cuda.cpp ${PYMPA_SMALL_CUDA_SOURCES})
  set(emulated_sources ${small_emulated})
  foreach(source ${PYMPA_CUDA_SOURCES})
    cmake_path(GET source STEM stem)
    pympa_join(emulated emulated/${stem}.cpp ${source})
    list(APPEND emulated_sources ${emulated})
  endforeach()
  pympa_add_module(_cuda_emulated KERNELS ${emulated_sources} csrc/cuda/emulated/gemm.cpp
                   csrc/cuda/emulated/interpreter.cpp
                   BINDINGS csrc/bindings/register_cuda.cpp OPS csrc/ops/copy.cpp)
  target_compile_definitions(_cuda_emulated PRIVATE PYMPA_CUDA_KERNELS PYMPA_CUDA_EMULATED)
  # `#pragma unroll` is for nvcc.
  target_compile_options(_cuda_emulated PRIVATE -Wno-unknown-pragmas)
endif()
