#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <span>
#include <vector>

#include "bindings.h"
#include "ndarray.h"
#include "spectralkv/graph_manager.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace skv = spectralkv;
using skv::python::Input;
using skv::python::OptionalInput;
using skv::python::Output;
using skv::python::stream_of;
using skv::python::view;
using skv::python::writable;

namespace {

using Release = nb::call_guard<nb::gil_scoped_release>;
using Marks = std::vector<std::uint8_t>;
using Counts = std::vector<std::int64_t>;
using Self = skv::GraphManager;

}  // namespace

void init_graph_manager(nb::module_& m) {
  m.attr("ALL_LAYERS") = skv::kAllLayers;

  nb::class_<skv::Statistics>(m, "Statistics", "Counts since construction.")
      .def_ro("rows_written", &skv::Statistics::rows_written)
      .def_ro("rows_nonfinite", &skv::Statistics::rows_nonfinite)
      .def_ro("walks", &skv::Statistics::walks)
      .def_ro("solves", &skv::Statistics::solves)
      .def_ro("evicted", &skv::Statistics::evicted);

  nb::class_<skv::MemoryUse>(m, "MemoryUse", "Bytes held by a manager.")
      .def_ro("graph_bytes", &skv::MemoryUse::graph_bytes)
      .def_ro("scratch_bytes", &skv::MemoryUse::scratch_bytes);

  nb::class_<Self>(m, "GraphManager", "The attention graphs of a model.")
      .def(
          "__init__",
          [](Self* self, const skv::GraphConfig& graph, const skv::WalkConfig& walk,
             std::uintptr_t stream) { new (self) Self(graph, walk, stream_of(stream)); },
          "graph"_a, "walk"_a, "stream"_a = 0)
      .def(
          "use_stream",
          [](Self& self, std::uintptr_t stream) { self.use_stream(stream_of(stream)); }, "stream"_a)
      .def(
          "update",
          [](Self& self, std::int64_t layer, const Input& query, const Input& keys,
             const OptionalInput& slots, double scale, double softcap, std::uintptr_t stream) {
            self.update(layer, view(query), view(keys), view(slots), {scale, softcap},
                        stream_of(stream));
          },
          "layer"_a, "query"_a.noconvert(), "keys"_a.noconvert(),
          "slots"_a.noconvert().none() = nb::none(), "scale"_a = 0.0, "softcap"_a = 0.0,
          "stream"_a = 0, Release())
      .def(
          "attend",
          [](Self& self, std::int64_t layer, const Input& query, const Input& keys,
             const Input& values, const OptionalInput& slots, const Output& out, double scale,
             double softcap, std::uintptr_t stream) {
            self.attend(layer, view(query), view(keys), view(values), view(slots), writable(out),
                        {scale, softcap}, stream_of(stream));
          },
          "layer"_a, "query"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "slots"_a.noconvert().none(), "out"_a.noconvert(), "scale"_a = 0.0, "softcap"_a = 0.0,
          "stream"_a = 0, Release())
      .def(
          "update_rows",
          [](Self& self, std::int64_t layer, const Input& queries, const Input& keys,
             const OptionalInput& valid, double scale, double softcap, std::int64_t row_stride,
             std::uintptr_t stream) {
            self.update_rows(
                layer, view(queries), view(keys),
                {.score = {scale, softcap}, .valid = view(valid), .row_stride = row_stride},
                stream_of(stream));
          },
          "layer"_a, "queries"_a.noconvert(), "keys"_a.noconvert(),
          "valid"_a.noconvert().none() = nb::none(), "scale"_a = 0.0, "softcap"_a = 0.0,
          "row_stride"_a = 1, "stream"_a = 0, Release())
      .def(
          "update_novelty",
          [](Self& self, std::int64_t layer, const Input& keys, std::uintptr_t stream) {
            self.update_novelty(layer, view(keys), stream_of(stream));
          },
          "layer"_a, "keys"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "walk",
          [](Self& self, std::int64_t layer, const Marks& sequences, std::uintptr_t stream,
             bool beside) { self.walk(layer, sequences, stream_of(stream), beside); },
          "layer"_a = skv::kAllLayers, "sequences"_a = Marks{}, "stream"_a = 0, "beside"_a = true,
          Release())
      .def(
          "solve",
          [](Self& self, std::int64_t layer, const Marks& sequences, std::uintptr_t stream,
             bool beside) { self.solve(layer, sequences, stream_of(stream), beside); },
          "layer"_a = skv::kAllLayers, "sequences"_a = Marks{}, "stream"_a = 0, "beside"_a = true,
          Release())
      .def(
          "update_and_step",
          [](Self& self, std::int64_t layer, const Input& query, const Input& keys,
             const OptionalInput& slots, double scale, double softcap, std::uintptr_t stream) {
            self.update_and_step(layer, view(query), view(keys), view(slots), {scale, softcap},
                                 stream_of(stream));
          },
          "layer"_a, "query"_a.noconvert(), "keys"_a.noconvert(),
          "slots"_a.noconvert().none() = nb::none(), "scale"_a = 0.0, "softcap"_a = 0.0,
          "stream"_a = 0, Release())
      .def(
          "scores",
          [](const Self& self, std::int64_t layer, const Output& out, int population,
             std::uintptr_t stream) {
            self.scores(layer, population, writable(out), stream_of(stream));
          },
          "layer"_a, "out"_a.noconvert(), "population"_a = -1, "stream"_a = 0, Release())
      .def(
          "visits",
          [](const Self& self, std::int64_t layer, const Output& out, int population,
             std::uintptr_t stream) {
            self.visits(layer, population, writable(out), stream_of(stream));
          },
          "layer"_a, "out"_a.noconvert(), "population"_a = 0, "stream"_a = 0, Release())
      .def("is_full", &Self::is_full, "layer"_a, "eviction"_a)
      .def("full_sequences", &Self::full_sequences, "layer"_a, "eviction"_a, "force"_a = false)
      .def("kept_length", &Self::kept_length, "layer"_a, "eviction"_a, "force"_a = false)
      .def("kept_counts", &Self::kept_counts, "layer"_a, "eviction"_a, "force"_a = false)
      .def(
          "select",
          [](const Self& self, std::int64_t layer, const skv::EvictionConfig& eviction, bool force,
             const Output& out, std::uintptr_t stream) {
            self.select(layer, eviction, force, writable(out), stream_of(stream));
          },
          "layer"_a, "eviction"_a, "force"_a, "out"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "safety_mask",
          [](const Self& self, std::int64_t layer, const skv::EvictionConfig& eviction,
             double top_fraction, const Output& out, std::uintptr_t stream) {
            self.safety_mask(layer, eviction, top_fraction, writable(out), stream_of(stream));
          },
          "layer"_a, "eviction"_a, "top_fraction"_a, "out"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "compact",
          [](Self& self, std::int64_t layer, const Input& keep, const std::optional<Output>& keys,
             const std::optional<Output>& values, const Counts& kept, std::uintptr_t stream) {
            self.compact(layer, view(keep), keys ? writable(*keys) : skv::TensorView{},
                         values ? writable(*values) : skv::TensorView{}, stream_of(stream), kept);
          },
          "layer"_a, "keep"_a.noconvert(), "keys"_a.noconvert().none() = nb::none(),
          "values"_a.noconvert().none() = nb::none(), "kept"_a = Counts{}, "stream"_a = 0,
          Release())
      .def(
          "release",
          [](Self& self, std::int64_t layer, const Input& keep, const Counts& kept,
             std::uintptr_t stream) { self.release(layer, view(keep), stream_of(stream), kept); },
          "layer"_a, "keep"_a.noconvert(), "kept"_a = Counts{}, "stream"_a = 0, Release())
      .def(
          "next_slots",
          [](const Self& self, std::int64_t layer, const Output& out, std::uintptr_t stream) {
            self.next_slots(layer, writable(out), stream_of(stream));
          },
          "layer"_a, "out"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "place",
          [](const Self& self, std::int64_t layer, const Input& new_keys, const Input& new_values,
             const Output& keys, const Output& values, const Output& slots, std::uintptr_t stream) {
            self.place(layer, view(new_keys), view(new_values), writable(keys), writable(values),
                       writable(slots), stream_of(stream));
          },
          "layer"_a, "new_keys"_a.noconvert(), "new_values"_a.noconvert(), "keys"_a.noconvert(),
          "values"_a.noconvert(), "slots"_a.noconvert(), "stream"_a = 0, Release())
      .def("truncate", &Self::truncate, "layer"_a, "count"_a, Release())
      .def(
          "select_batch",
          [](Self& self, std::int64_t layer, const std::vector<std::int64_t>& sequences) {
            self.select_batch(layer, sequences);
          },
          "layer"_a, "sequences"_a, Release())
      .def("reset", &Self::reset, "layer"_a = skv::kAllLayers, "sequence"_a = nb::none(), Release())
      .def("reserve", &Self::reserve, "layer"_a, "capacity"_a, Release())
      .def(
          "divide",
          [](Self& self, std::int64_t layer, const Counts& rooms) { self.divide(layer, rooms); },
          "layer"_a, "rooms"_a, Release())
      .def("synchronize", &Self::synchronize, Release())
      .def("refresh", &Self::refresh, Release())
      .def("length", &Self::length, "layer"_a)
      .def("capacity", &Self::capacity, "layer"_a)
      .def(
          "rooms",
          [](const Self& self, std::int64_t layer) {
            const auto rooms = self.rooms(layer);
            return Counts(rooms.begin(), rooms.end());
          },
          "layer"_a)
      .def("batch_size", &Self::batch_size, "layer"_a)
      .def("graphs_per_sequence", &Self::graphs_per_sequence)
      .def("tokens_seen", &Self::tokens_seen, "layer"_a, "sequence"_a)
      .def("tokens_held", &Self::tokens_held, "layer"_a, "sequence"_a)
      .def("tokens_walked", &Self::tokens_walked, "layer"_a, "sequence"_a)
      .def(
          "positions",
          [](const Self& self, std::int64_t layer, const Output& out, std::uintptr_t stream) {
            self.positions(layer, writable(out), stream_of(stream));
          },
          "layer"_a, "out"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "rows",
          [](const Self& self, std::int64_t layer, const Output& neighbors,
             const Output& probabilities, std::uintptr_t stream) {
            self.rows(layer, writable(neighbors), writable(probabilities), stream_of(stream));
          },
          "layer"_a, "neighbors"_a.noconvert(), "probabilities"_a.noconvert(), "stream"_a = 0,
          Release())
      .def(
          "load_rows",
          [](Self& self, std::int64_t layer, const Input& positions, const Input& neighbors,
             const Input& probabilities, std::uintptr_t stream) {
            self.load_rows(layer, view(positions), view(neighbors), view(probabilities),
                           stream_of(stream));
          },
          "layer"_a, "positions"_a.noconvert(), "neighbors"_a.noconvert(),
          "probabilities"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "load_restart_weights",
          [](Self& self, std::int64_t layer, const Input& weights, std::uintptr_t stream) {
            self.load_restart_weights(layer, view(weights), stream_of(stream));
          },
          "layer"_a, "weights"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "restart_distribution",
          [](const Self& self, std::int64_t layer, int population, const Output& out,
             std::uintptr_t stream) {
            self.restart_distribution(layer, population, writable(out), stream_of(stream));
          },
          "layer"_a, "population"_a, "out"_a.noconvert(), "stream"_a = 0, Release())
      .def(
          "save_layer",
          [](const Self& self, std::int64_t layer) {
            const auto saved = [&] {
              const nb::gil_scoped_release release;
              return self.save_layer(layer);
            }();
            return nb::bytes(saved.data(), saved.size());
          },
          "layer"_a)
      .def(
          "load_layer",
          [](Self& self, std::int64_t layer, const nb::bytes& saved) {
            const std::span bytes(static_cast<const std::uint8_t*>(saved.data()), saved.size());
            const nb::gil_scoped_release release;
            self.load_layer(layer, bytes);
          },
          "layer"_a, "saved"_a)
      .def("statistics", &Self::statistics, Release())
      .def("memory_use", &Self::memory_use);
}
