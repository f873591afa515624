#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include "bindings.h"
#include "ndarray.h"
#include "spectralkv/attention.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace skv = spectralkv;
using skv::python::Input;
using skv::python::OptionalInput;
using skv::python::Output;
using skv::python::stream_of;
using skv::python::view;
using skv::python::writable;

void init_attention(nb::module_& m) {
  m.def(
      "decode_attention",
      [](const Input& query, const Input& keys, const Input& values, const OptionalInput& positions,
         std::int64_t length, const Output& out, double scale, double softcap,
         std::uintptr_t stream) {
        const skv::ConstTensorView one = view(query);
        skv::decode_attention(one, view(keys), view(values), view(positions), length, writable(out),
                              {scale, softcap}, one.device, stream_of(stream));
      },
      "query"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
      "positions"_a.noconvert().none(), "length"_a, "out"_a.noconvert(), "scale"_a = 0.0,
      "softcap"_a = 0.0, "stream"_a = 0, nb::call_guard<nb::gil_scoped_release>(),
      "Attention of one token a sequence over slots [0, length) of its cache.");
}
