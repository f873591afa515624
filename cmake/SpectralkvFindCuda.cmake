# Decides whether the CUDA backend is built, and with which compiler. Sets SPECTRALKV_WITH_CUDA and, when it is ON,
# SPECTRALKV_CURAND_INCLUDE_DIR.
#
# The compiler, first match:
#   1. CMAKE_CUDA_COMPILER or the environment's CUDACXX,
#   2. nvcc of the PyPI wheels, when the environment's SPECTRALKV_CUDA_WHEELS is true,
#   3. nvcc on PATH, in CUDAToolkit_ROOT, CUDA_HOME, CUDA_PATH or /usr/local/cuda,
#   4. nvcc of the PyPI wheels (cuda-toolkit[nvcc,cccl,curand,cudart]) that the Python of this build sees.
# cuRAND's device headers: the toolkit's, else those of the nvidia-curand wheel.

set(SPECTRALKV_WITH_CUDA OFF)
if(NOT SPECTRALKV_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SPECTRALKV_CUDA must be AUTO, ON or OFF, got '${SPECTRALKV_CUDA}'")
endif()
if(SPECTRALKV_CUDA STREQUAL "OFF")
  message(STATUS "spectralkv: CPU backend only (SPECTRALKV_CUDA=OFF)")
  return()
endif()

# AUTO tells and goes on without CUDA, ON stops.
macro(_spectralkv_no_cuda why)
  if(SPECTRALKV_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SPECTRALKV_CUDA=ON, but ${why}")
  endif()
  message(STATUS "spectralkv: CPU backend only: ${why}")
  return()
endmacro()

# The wheels unpack into site-packages/nvidia/cu<major>; `nvidia` is a namespace package and may have several roots.
function(_spectralkv_wheel_roots out)
  find_package(Python COMPONENTS Interpreter QUIET)
  set(roots "")
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c [=[
import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
for root in (spec.submodule_search_locations or ()) if spec else ():
    for folder in sorted(pathlib.Path(root).glob("cu1[0-9]"), reverse=True):
        print(folder.as_posix())
]=]
      OUTPUT_VARIABLE roots OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    string(REPLACE "\n" ";" roots "${roots}")
  endif()
  set(${out} "${roots}" PARENT_SCOPE)
endfunction()

_spectralkv_wheel_roots(_wheel_roots)

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  set(_wheel_nvcc "")
  foreach(_root IN LISTS _wheel_roots)
    if(NOT _wheel_nvcc AND EXISTS "${_root}/bin/nvcc" AND EXISTS "${_root}/lib/libcudart_static.a")
      set(_wheel_nvcc "${_root}/bin/nvcc")
    endif()
  endforeach()
  find_program(_system_nvcc nvcc NO_CACHE
    HINTS "${CUDAToolkit_ROOT}" ENV CUDAToolkit_ROOT ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if("$ENV{SPECTRALKV_CUDA_WHEELS}" AND NOT _wheel_nvcc)
    _spectralkv_no_cuda("SPECTRALKV_CUDA_WHEELS is set and the Python of this build sees no wheel with nvcc: pip install \"cuda-toolkit[nvcc,cccl,curand,cudart]==13.0.*\"")
  elseif(_wheel_nvcc AND ("$ENV{SPECTRALKV_CUDA_WHEELS}" OR NOT _system_nvcc))
    set(CMAKE_CUDA_COMPILER "${_wheel_nvcc}")
  elseif(_system_nvcc)
    set(CMAKE_CUDA_COMPILER "${_system_nvcc}")
  else()
    _spectralkv_no_cuda("there is no nvcc: put one on PATH, set CUDACXX, or pip install \"cuda-toolkit[nvcc,cccl,curand,cudart]==13.0.*\"")
  endif()
endif()

if(CMAKE_CUDA_COMPILER MATCHES "^(.*/nvidia/cu1[0-9])/bin/nvcc$")
  # The wheels differ from a toolkit in two ways: libraries in lib, where nvcc.profile looks in lib64, and no plain
  # libcudart.so link for FindCUDAToolkit to find.
  set(_wheel "${CMAKE_MATCH_1}")
  string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${_wheel}/lib")
  set(CUDAToolkit_ROOT "${_wheel}")
  file(GLOB _cudart "${_wheel}/lib/libcudart.so.*")
  set(CUDA_CUDART "${_cudart}" CACHE FILEPATH "The wheel's CUDA runtime" FORCE)
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  # Turing to Blackwell for CUDA 12.8 and later; 100 also carries the PTX that newer GPUs compile at load.
  set(CMAKE_CUDA_ARCHITECTURES "75-real;80-real;86-real;89-real;90-real;100;120-real" CACHE STRING "CUDA architectures")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

set(_curand_hints ${CUDAToolkit_INCLUDE_DIRS})
foreach(_root IN LISTS _wheel_roots)
  if(_root MATCHES "/cu${CUDAToolkit_VERSION_MAJOR}$") # never the headers of another major version
    list(APPEND _curand_hints "${_root}/include")
  endif()
endforeach()
find_path(SPECTRALKV_CURAND_INCLUDE_DIR curand_kernel.h PATHS ${_curand_hints} NO_DEFAULT_PATH)
if(NOT SPECTRALKV_CURAND_INCLUDE_DIR)
  _spectralkv_no_cuda("nvcc ${CUDAToolkit_VERSION} has no curand_kernel.h: install the toolkit's cuRAND, or pip install \"nvidia-curand==10.4.0.*\" for CUDA 13.0")
endif()

include(CheckCompilerFlag)
check_compiler_flag(CUDA --compress-mode=size SPECTRALKV_NVCC_COMPRESS_MODE)

set(SPECTRALKV_WITH_CUDA ON)
message(STATUS "spectralkv: CUDA ${CUDAToolkit_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}, cuRAND headers in ${SPECTRALKV_CURAND_INCLUDE_DIR}")
