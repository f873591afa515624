#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "ndarray.h"
#include "spectralkv/monitor.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace skv = spectralkv;
using skv::python::Input;
using skv::python::OptionalInput;
using skv::python::Output;
using skv::python::stream_of;
using skv::python::view;
using skv::python::writable;

void init_monitor(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  using Self = skv::Monitor;
  nb::class_<Self>(m, "Monitor", "The controller for an engine's loop.")
      .def(
          "__init__",
          [](Self* self, const skv::GraphConfig& graph, const skv::WalkConfig& walk,
             const skv::MonitorConfig& monitor,
             std::uintptr_t stream) { new (self) Self(graph, walk, monitor, stream_of(stream)); },
          "graph"_a, "walk"_a, "monitor"_a, "stream"_a = 0)
      .def(
          "on_prefill",
          [](Self& self, std::int64_t layer, const Input& queries, const Input& keys,
             const OptionalInput& valid, double scale, double softcap, std::uintptr_t stream) {
            self.on_prefill(layer, view(queries), view(keys), {scale, softcap}, view(valid),
                            stream_of(stream));
          },
          "layer"_a, "queries"_a.noconvert(), "keys"_a.noconvert(),
          "valid"_a.noconvert().none() = nb::none(), "scale"_a = 0.0, "softcap"_a = 0.0,
          "stream"_a = 0, Release())
      .def(
          "on_prefill_end",
          [](Self& self, std::int64_t layer, const Input& keys, std::uintptr_t stream) {
            self.on_prefill_end(layer, view(keys), stream_of(stream));
          },
          "layer"_a, "keys"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "on_step",
          [](Self& self, std::int64_t layer, const Input& query, const Input& keys,
             const OptionalInput& slots, double scale, double softcap, std::uintptr_t stream) {
            self.on_step(layer, view(query), view(keys), view(slots), {scale, softcap},
                         stream_of(stream));
          },
          "layer"_a, "query"_a.noconvert(), "keys"_a.noconvert(),
          "slots"_a.noconvert().none() = nb::none(), "scale"_a = 0.0, "softcap"_a = 0.0,
          "stream"_a = 0, Release())
      .def(
          "renew_due",
          [](Self& self, std::int64_t layer, const Input& keys, std::uintptr_t stream) {
            self.renew_due(layer, view(keys), stream_of(stream));
          },
          "layer"_a, "keys"_a.noconvert(), "stream"_a = 0, Release())
      .def("on_finish", &Self::on_finish, "sequence"_a, Release())
      .def("is_full", &Self::is_full, "layer"_a)
      .def("kept_length", &Self::kept_length, "layer"_a)
      .def("set_head_budgets", &Self::set_head_budgets, "layer"_a, "budgets"_a)
      .def(
          "keep",
          [](Self& self, std::int64_t layer, const Input& keys, const Output& out,
             std::uintptr_t stream) {
            self.keep(layer, view(keys), writable(out), stream_of(stream));
          },
          "layer"_a, "keys"_a.noconvert(), "out"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "safety_mask",
          [](const Self& self, std::int64_t layer, const Output& out, std::uintptr_t stream) {
            self.safety_mask(layer, writable(out), stream_of(stream));
          },
          "layer"_a, "out"_a.noconvert(), "stream"_a = 0, Release())
      .def_prop_ro(
          "graph", [](Self& self) -> skv::GraphManager& { return self.graph(); },
          nb::rv_policy::reference_internal);
}
