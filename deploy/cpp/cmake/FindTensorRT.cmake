# TensorRT::TensorRT: NvInfer.h and the library nvinfer, or that of TensorRT-RTX. TensorRT_ROOT says where to look.

find_path(TensorRT_INCLUDE_DIR NvInfer.h)
find_library(TensorRT_LIBRARY NAMES nvinfer tensorrt_rtx)
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR
  REASON_FAILURE_MESSAGE
    "TensorRT comes with JetPack, as NVIDIA's deb packages, or as an archive: set TensorRT_ROOT to its folder")

if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT UNKNOWN IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES
    IMPORTED_LOCATION "${TensorRT_LIBRARY}" INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR}")
endif()
