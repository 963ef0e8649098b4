# The Python extension fusestep._core.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

pybind11_add_module(fusestep_core MODULE
  csrc/bindings/module.cpp
  csrc/bindings/state_files.cpp
  csrc/bindings/tensor_reader.cpp
  csrc/bindings/torch_device.cpp
  csrc/bindings/torch_stepper.cpp)
set_target_properties(fusestep_core PROPERTIES OUTPUT_NAME _core)
target_include_directories(fusestep_core PRIVATE csrc)
target_include_directories(fusestep_core SYSTEM PRIVATE csrc/third_party)
target_compile_features(fusestep_core PRIVATE cxx_std_20)
target_compile_definitions(fusestep_core PRIVATE
  FUSESTEP_VERSION="${PROJECT_VERSION}"
  FUSESTEP_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  $<$<BOOL:${FUSESTEP_WITH_CUDA}>:FUSESTEP_WITH_CUDA>)
target_link_libraries(fusestep_core PRIVATE fusestep)
install(TARGETS fusestep_core DESTINATION fusestep COMPONENT python)
