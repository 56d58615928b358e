# What the chosen runtimes are compiled of. Everything is linked privately: who links vitprune sees its one header only.

find_package(nlohmann_json 3.9 CONFIG QUIET)
if(NOT nlohmann_json_FOUND)
  message(FATAL_ERROR "vitprune reads JSON with nlohmann_json, which was not found: `apt install nlohmann-json3-dev` "
    "or `vcpkg install nlohmann-json`, or set CMAKE_PREFIX_PATH to where it is")
endif()

set(VITPRUNE_BACKEND_SOURCES)
set(VITPRUNE_BACKEND_DEFINITIONS)
set(VITPRUNE_BACKEND_INCLUDES)
set(VITPRUNE_BACKEND_LIBRARIES $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>)  # headers: nothing of it is installed

if(VITPRUNE_ORT)
  find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_c_api.h PATH_SUFFIXES onnxruntime onnxruntime/core/session
    DOC "The folder with onnxruntime_c_api.h")
  if(NOT ONNXRUNTIME_INCLUDE_DIR)
    message(FATAL_ERROR "ONNX Runtime's header onnxruntime_c_api.h was not found: `apt install libonnxruntime-dev` "
      "(Debian 13), `vcpkg install onnxruntime`, or set ONNXRUNTIME_INCLUDE_DIR to the include folder of a release "
      "archive; -DVITPRUNE_ORT=OFF leaves ONNX Runtime out")
  endif()
  list(APPEND VITPRUNE_BACKEND_SOURCES src/onnxruntime.cpp)
  list(APPEND VITPRUNE_BACKEND_DEFINITIONS VITPRUNE_ORT)
  list(APPEND VITPRUNE_BACKEND_INCLUDES ${ONNXRUNTIME_INCLUDE_DIR})
  list(APPEND VITPRUNE_BACKEND_LIBRARIES ${CMAKE_DL_LIBS})
endif()

if(VITPRUNE_OPENVINO)
  find_package(OpenVINO CONFIG QUIET COMPONENTS Runtime)
  if(NOT OpenVINO_FOUND)
    message(FATAL_ERROR "OpenVINO was not found: `pip install openvino`, and set OpenVINO_DIR to the folder "
      "openvino/cmake in it; -DVITPRUNE_OPENVINO=OFF leaves OpenVINO out")
  endif()
  list(APPEND VITPRUNE_BACKEND_SOURCES src/openvino.cpp)
  list(APPEND VITPRUNE_BACKEND_DEFINITIONS VITPRUNE_OPENVINO)
  list(APPEND VITPRUNE_BACKEND_LIBRARIES openvino::runtime)
endif()

if(VITPRUNE_TENSORRT)
  list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})
  if(NOT TARGET TensorRT::TensorRT)
    find_package(TensorRT REQUIRED)
  endif()
  if(NOT TARGET CUDA::cudart)
    find_package(CUDAToolkit REQUIRED)
  endif()
  list(APPEND VITPRUNE_BACKEND_SOURCES src/tensorrt.cpp)
  list(APPEND VITPRUNE_BACKEND_DEFINITIONS VITPRUNE_TENSORRT)
  list(APPEND VITPRUNE_BACKEND_LIBRARIES TensorRT::TensorRT CUDA::cudart)
endif()
