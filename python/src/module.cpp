#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "spectralkv/error.h"
#include "spectralkv/version.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_core, m) {
  m.doc() = "Bindings of libspectralkv.";
  m.attr("__version__") = spectralkv::version();
  m.def("built_with_cuda", &spectralkv::built_with_cuda,
        "True when the CUDA backend was compiled in, whether or not there is a device for it.");
  m.def("cuda_device_count", &spectralkv::cuda_device_count,
        "CUDA devices that can be used now; 0 without backend, driver or device.");
  m.def("cuda_status", &spectralkv::cuda_status,
        "Why ``cuda_device_count()`` is 0; empty when it is not.");
  m.def("cuda_device_name", &spectralkv::cuda_device_name, "index"_a,
        "Name of a CUDA device; empty where there is no such device.");
  m.def("cuda_driver_version", &spectralkv::cuda_driver_version,
        "Newest CUDA that the driver supports, as 1000 * major + 10 * minor; 0 without a driver.");
  m.def("cpu_simd", &spectralkv::cpu_simd, "Instruction set that the CPU backend uses here.");
  m.def("cpu_threads", &spectralkv::cpu_threads,
        "Threads that the CPU backend uses unless told otherwise.");

  // Each is also the Python exception that people expect. nanobind asks the newest translator
  // first, so the base class comes first.
  const nb::exception<spectralkv::Error> error(m, "SpectralKVError", PyExc_Exception);
  const auto bases = [&](PyObject* builtin) { return nb::make_tuple(error, nb::handle(builtin)); };
  nb::exception<spectralkv::InvalidArgument>(m, "InvalidArgument", bases(PyExc_ValueError));
  nb::exception<spectralkv::BackendUnavailable>(m, "BackendUnavailable", bases(PyExc_RuntimeError));
  nb::exception<spectralkv::CudaError>(m, "CudaError", bases(PyExc_RuntimeError));

  init_config(m);
  init_attention(m);
  init_graph_manager(m);
  init_monitor(m);
}
