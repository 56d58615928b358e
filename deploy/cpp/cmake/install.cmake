# What `find_package(vitprune)` finds: the library, its header, and which runtimes it was built with.

include(CMakePackageConfigHelpers)
set(VITPRUNE_PACKAGE ${CMAKE_INSTALL_LIBDIR}/cmake/vitprune)

install(TARGETS vitprune EXPORT vitpruneTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/vitprune DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT vitpruneTargets NAMESPACE vitprune:: DESTINATION ${VITPRUNE_PACKAGE})

configure_package_config_file(cmake/vitpruneConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/vitpruneConfig.cmake
  INSTALL_DESTINATION ${VITPRUNE_PACKAGE})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/vitpruneConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/vitpruneConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/vitpruneConfigVersion.cmake
  cmake/FindTensorRT.cmake DESTINATION ${VITPRUNE_PACKAGE})
