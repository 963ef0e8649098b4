# The library. Bits are a feature: the floating-point flags below hold in every build type.
set(FUSESTEP_FP_FLAGS -ffp-contract=off -fno-math-errno -fno-trapping-math)
find_package(Threads REQUIRED)

# fusestep_add_objects(name sources...): a part of the library. Those of the tests take the objects as well.
function(fusestep_add_objects name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/csrc)
  target_include_directories(${name} SYSTEM PRIVATE ${PROJECT_SOURCE_DIR}/csrc/third_party)
  target_compile_features(${name} PRIVATE cxx_std_20)
  target_compile_options(${name} PRIVATE
    ${FUSESTEP_FP_FLAGS} -Wall -Wextra -Wconversion -Wshadow)
  target_link_libraries(${name} PRIVATE Threads::Threads)
  set_target_properties(${name} PROPERTIES
    POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_sources(fusestep PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

add_library(fusestep)
fusestep_add_objects(fusestep_objects
  csrc/borrowed.cpp
  csrc/checkpoint/description.cpp
  csrc/checkpoint/dict.cpp
  csrc/checkpoint/ranks.cpp
  csrc/checkpoint/engine_state.cpp
  csrc/checkpoint/match.cpp
  csrc/checkpoint/report.cpp
  csrc/checkpoint/state_file.cpp
  csrc/capture.cpp
  csrc/engine.cpp
  csrc/flat.cpp
  csrc/groups.cpp
  csrc/hyper.cpp
  csrc/names.cpp
  csrc/norm_halves.cpp
  csrc/optimizer.cpp
  csrc/plan.cpp
  csrc/schedule.cpp
  csrc/state.cpp
  csrc/state_store.cpp
  csrc/validate.cpp
  csrc/cpu/backend_cpu.cpp
  csrc/cpu/instruction_set.cpp
  csrc/cpu/parallel_for.cpp
  csrc/cpu/thread_pool.cpp
  csrc/cpu/zeroed_memory.cpp
  csrc/files/atomic_file.cpp
  csrc/files/crc32c.cpp
  csrc/files/file_descriptor.cpp
  csrc/files/header.cpp
  csrc/files/safetensors_reader.cpp
  csrc/files/safetensors_writer.cpp)
add_library(fusestep::fusestep ALIAS fusestep)
set_target_properties(fusestep PROPERTIES
  LINKER_LANGUAGE CXX
  VERSION ${PROJECT_VERSION}
  SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
target_include_directories(fusestep PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(fusestep PUBLIC cxx_std_20)
target_link_libraries(fusestep PRIVATE Threads::Threads)
if(UNIX AND NOT APPLE)
  # Threads of ours sleep in it: dlclose() must not unmap it.
  target_link_options(fusestep PRIVATE -Wl,-z,nodelete)
endif()

# One object of the CPU loops per instruction set. -O3 in every build type: without it (and without
# -fno-math-errno) the loops silently stay scalar.
function(fusestep_add_isa isa)
  fusestep_add_objects(fusestep_kernels_${isa} csrc/cpu/kernels.cpp)
  target_compile_definitions(fusestep_kernels_${isa} PRIVATE FUSESTEP_ISA=${isa})
  target_compile_options(fusestep_kernels_${isa} PRIVATE -O3 ${ARGN})
endfunction()

fusestep_add_isa(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  fusestep_add_isa(avx2 -mavx2 -mfma)
  fusestep_add_isa(avx512 -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mfma
                   -mprefer-vector-width=512)
endif()

# fusestep_cuda is the CUDA backend, or what stands for it in a build without.
if(FUSESTEP_WITH_CUDA)
  include(cmake/kernels.cmake)
else()
  fusestep_add_objects(fusestep_cuda csrc/cuda_unavailable.cpp)
endif()
