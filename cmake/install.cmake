# The shared library and what `cmake --install` puts where: library, header, pkg-config file, CMake package.
include(CMakePackageConfigHelpers)

add_library(onebitmerge SHARED $<TARGET_OBJECTS:obm_objects>)
set_target_properties(onebitmerge PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION 0)
target_include_directories(onebitmerge INTERFACE
  $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/core/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(onebitmerge PRIVATE ${OBM_LINK} $<BUILD_INTERFACE:obm_flags>)

# An absolute CMAKE_INSTALL_LIBDIR (some distributions) must not be put behind the prefix.
foreach(dir LIBDIR INCLUDEDIR)
  if(IS_ABSOLUTE "${CMAKE_INSTALL_${dir}}")
    set(OBM_PC_${dir} "${CMAKE_INSTALL_${dir}}")
  else()
    set(OBM_PC_${dir} "\${prefix}/${CMAKE_INSTALL_${dir}}")
  endif()
endforeach()
# Relative, so that `cmake --install --prefix` and moved trees are found.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  set(OBM_PC_PREFIX "${CMAKE_INSTALL_PREFIX}")
else()
  file(RELATIVE_PATH OBM_PC_PREFIX "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
  set(OBM_PC_PREFIX "\${pcfiledir}/${OBM_PC_PREFIX}")
endif()
configure_file(cmake/onebitmerge.pc.in onebitmerge.pc @ONLY)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/onebitmerge)
configure_package_config_file(cmake/onebitmergeConfig.cmake.in onebitmergeConfig.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(onebitmergeConfigVersion.cmake COMPATIBILITY SameMinorVersion)

install(TARGETS onebitmerge EXPORT onebitmergeTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime NAMELINK_COMPONENT development)
install(TARGETS onebitmerge_static ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)
install(FILES core/include/onebitmerge.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development)
install(FILES ${CMAKE_BINARY_DIR}/onebitmerge.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT development)
install(EXPORT onebitmergeTargets NAMESPACE onebitmerge:: DESTINATION ${package} COMPONENT development)
install(FILES ${CMAKE_BINARY_DIR}/onebitmergeConfig.cmake ${CMAKE_BINARY_DIR}/onebitmergeConfigVersion.cmake
  DESTINATION ${package} COMPONENT development)
