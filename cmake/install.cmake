# `cmake --install` gives find_package(fusestep CONFIG REQUIRED) and the target fusestep::fusestep.
include(CMakePackageConfigHelpers)
set(FUSESTEP_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/fusestep)

install(TARGETS fusestep EXPORT fusestep-targets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY include/fusestep DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.h"
  PATTERN "detail" EXCLUDE
  PATTERN "rules" EXCLUDE)
install(EXPORT fusestep-targets NAMESPACE fusestep:: DESTINATION ${FUSESTEP_CMAKE_DIR})
configure_package_config_file(cmake/fusestep-config.cmake.in
  ${PROJECT_BINARY_DIR}/fusestep-config.cmake INSTALL_DESTINATION ${FUSESTEP_CMAKE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fusestep-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/fusestep-config.cmake
  ${PROJECT_BINARY_DIR}/fusestep-config-version.cmake
  DESTINATION ${FUSESTEP_CMAKE_DIR})
