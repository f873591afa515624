# What a consumer gets: library, public headers, and the files that find_package(spectralkv CONFIG) reads.
include(CMakePackageConfigHelpers)

set(_config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/spectralkv")

install(TARGETS spectralkv EXPORT spectralkvTargets
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime NAMELINK_COMPONENT runtime
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime
  RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}" COMPONENT runtime
  FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT runtime)
install(EXPORT spectralkvTargets NAMESPACE spectralkv:: DESTINATION "${_config_dir}" COMPONENT runtime)

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/spectralkvConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/spectralkvConfig.cmake" INSTALL_DESTINATION "${_config_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/spectralkvConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/spectralkvConfig.cmake" "${PROJECT_BINARY_DIR}/spectralkvConfigVersion.cmake"
  DESTINATION "${_config_dir}" COMPONENT runtime)
if(NOT SKBUILD) # a wheel has it among what it says of itself
  install(FILES "${PROJECT_SOURCE_DIR}/LICENSE"
    DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/spectralkv" COMPONENT runtime)
endif()
