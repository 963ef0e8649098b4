# The CUDA backend. -fmad=false: a product and a sum are fused only where a rule says fma, so that the
# GPU gives the bits of the CPU. Nothing of fast-math. -std by hand: CMake 3.25 does not know nvcc 13's.
set(FUSESTEP_CUDA_OPTIONS -std=c++20 -fmad=false --expt-relaxed-constexpr
  -Xcompiler=-ffp-contract=off)
# A third of the size. Drivers of earlier major versions cannot unpack it.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  list(APPEND FUSESTEP_CUDA_OPTIONS --compress-mode=size)
endif()
add_library(fusestep_cuda OBJECT
  kernels/apply.cu
  kernels/apply_adam.cu
  kernels/apply_rmsprop.cu
  kernels/apply_sgd.cu
  kernels/backend_cuda.cu)
target_include_directories(fusestep_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include)
target_compile_options(fusestep_cuda PRIVATE ${FUSESTEP_CUDA_OPTIONS})
set_target_properties(fusestep_cuda PROPERTIES
  POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
target_sources(fusestep PRIVATE $<TARGET_OBJECTS:fusestep_cuda>)
# A program that links the static library needs the CUDA runtime, and no CUDA language of its own.
target_link_libraries(fusestep PRIVATE CUDA::cudart_static)
set_target_properties(fusestep PROPERTIES CUDA_RUNTIME_LIBRARY Static)
