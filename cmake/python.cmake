# The Python extension fusestep._core. The tests build a second one, fusestep_core_sim, whose tensors lie on
# simulated CUDA devices.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

# fusestep_add_extension(target library sources...)
function(fusestep_add_extension target library)
  pybind11_add_module(${target} MODULE
    csrc/bindings/group_reader.cpp
    csrc/bindings/module.cpp
    csrc/bindings/remembered_step.cpp
    csrc/bindings/state_files.cpp
    csrc/bindings/tensor_info.cpp
    csrc/bindings/tensor_reader.cpp
    csrc/bindings/torch_library.cpp
    csrc/bindings/torch_shim.cpp
    csrc/bindings/torch_stepper.cpp
    csrc/bindings/torch_threads.cpp
    ${ARGN})
  set_target_properties(${target} PROPERTIES OUTPUT_NAME _core)
  target_include_directories(${target} PRIVATE csrc csrc/bindings)
  target_include_directories(${target} SYSTEM PRIVATE csrc/third_party)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_definitions(${target} PRIVATE
    FUSESTEP_VERSION="${PROJECT_VERSION}"
    FUSESTEP_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  target_link_libraries(${target} PRIVATE ${library} ${CMAKE_DL_LIBS})
endfunction()

if(FUSESTEP_BUILD_PYTHON)
  fusestep_add_extension(fusestep_core fusestep csrc/bindings/torch_device.cpp)
  target_compile_definitions(fusestep_core PRIVATE
    $<$<BOOL:${FUSESTEP_WITH_CUDA}>:FUSESTEP_WITH_CUDA>)
  install(TARGETS fusestep_core DESTINATION fusestep COMPONENT python)
endif()
if(FUSESTEP_BUILD_PYTHON_SIM)
  fusestep_add_extension(fusestep_core_sim fusestep_cuda_sim tests/python/simulated_device.cpp)
  target_compile_definitions(fusestep_core_sim PRIVATE FUSESTEP_WITH_CUDA)
  set_target_properties(fusestep_core_sim PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/python_sim)
endif()
