#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "spectralkv/config.h"
#include "spectralkv/monitor.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace skv = spectralkv;

void init_config(nb::module_& m) {
  nb::enum_<skv::EdgeLaw>(m, "EdgeLaw", "How a token's row stores its neighbours.")
      .value("uniform", skv::EdgeLaw::uniform)
      .value("weighted", skv::EdgeLaw::weighted)
      .value("attention", skv::EdgeLaw::attention);
  nb::enum_<skv::GraphScope>(m, "GraphScope", "Which heads share a graph.")
      .value("head", skv::GraphScope::head)
      .value("layer", skv::GraphScope::layer);
  nb::enum_<skv::Restart>(m, "Restart", "Where a walker goes when it restarts.")
      .value("current", skv::Restart::current)
      .value("recent", skv::Restart::recent)
      .value("novelty", skv::Restart::novelty);
  nb::enum_<skv::VisitCount>(m, "VisitCount", "Which arrivals a visit counts.")
      .value("edges", skv::VisitCount::edges)
      .value("all", skv::VisitCount::all);
  nb::enum_<skv::Solver>(m, "Solver", "How scores are found.")
      .value("walk", skv::Solver::walk)
      .value("exact", skv::Solver::exact);
  nb::enum_<skv::DeviceType>(m, "DeviceType", "Kind of device.")
      .value("cpu", skv::DeviceType::cpu)
      .value("cuda", skv::DeviceType::cuda);

  nb::class_<skv::Device>(m, "Device", "Where memory lies.")
      .def(
          "__init__",
          [](skv::Device* self, skv::DeviceType type, int index) {
            new (self) skv::Device{type, index};
          },
          "type"_a = skv::DeviceType::cpu, "index"_a = 0)
      .def_rw("type", &skv::Device::type)
      .def_rw("index", &skv::Device::index);

  nb::class_<skv::Rotary>(m, "Rotary", "How keys were turned by their positions.")
      .def(nb::init<>())
      .def_rw("inv_freq", &skv::Rotary::inv_freq)
      .def_rw("interleaved", &skv::Rotary::interleaved);

  nb::class_<skv::GraphConfig>(m, "GraphConfig", "Shape and memory of the graphs of one model.")
      .def(nb::init<>())
      .def_rw("num_layers", &skv::GraphConfig::num_layers)
      .def_rw("batch_size", &skv::GraphConfig::batch_size)
      .def_rw("num_query_heads", &skv::GraphConfig::num_query_heads)
      .def_rw("num_kv_heads", &skv::GraphConfig::num_kv_heads)
      .def_rw("head_dim", &skv::GraphConfig::head_dim)
      .def_rw("capacity", &skv::GraphConfig::capacity)
      .def_rw("top_k", &skv::GraphConfig::top_k)
      .def_rw("edge_law", &skv::GraphConfig::edge_law)
      .def_rw("pack_rows", &skv::GraphConfig::pack_rows)
      .def_rw("scope", &skv::GraphConfig::scope)
      .def_rw("num_sinks", &skv::GraphConfig::num_sinks)
      .def_rw("seed", &skv::GraphConfig::seed)
      .def_rw("head_offset", &skv::GraphConfig::head_offset)
      .def_rw("total_kv_heads", &skv::GraphConfig::total_kv_heads)
      .def_rw("device", &skv::GraphConfig::device)
      .def_rw("num_threads", &skv::GraphConfig::num_threads)
      .def_rw("eager_checks", &skv::GraphConfig::eager_checks)
      .def_rw("rotary", &skv::GraphConfig::rotary)
      .def("validate", &skv::GraphConfig::validate);

  nb::class_<skv::Population>(m, "Population", "A part of the walkers with its restart and count.")
      .def(nb::init<>())
      .def_rw("restart", &skv::Population::restart)
      .def_rw("count", &skv::Population::count)
      .def_rw("share", &skv::Population::share)
      .def_rw("recent_fraction", &skv::Population::recent_fraction)
      .def_rw("recent_tokens", &skv::Population::recent_tokens)
      .def_rw("decay", &skv::Population::decay)
      .def_rw("solver", &skv::Population::solver);

  nb::class_<skv::WalkConfig>(m, "WalkConfig", "Personalized PageRank by random walks.")
      .def(nb::init<>())
      .def_rw("num_walkers", &skv::WalkConfig::num_walkers)
      .def_rw("walk_length", &skv::WalkConfig::walk_length)
      .def_rw("restart_prob", &skv::WalkConfig::restart_prob)
      .def_rw("decay", &skv::WalkConfig::decay)
      .def_rw("novelty_width", &skv::WalkConfig::novelty_width)
      .def_rw("populations", &skv::WalkConfig::populations)
      .def("validate", &skv::WalkConfig::validate);

  nb::class_<skv::EvictionConfig>(m, "EvictionConfig", "When a cache is cut, and what stays.")
      .def(nb::init<>())
      .def_rw("budget", &skv::EvictionConfig::budget)
      .def_rw("interval", &skv::EvictionConfig::interval)
      .def_rw("window", &skv::EvictionConfig::window)
      .def_rw("sinks", &skv::EvictionConfig::sinks)
      .def_rw("head_budgets", &skv::EvictionConfig::head_budgets)
      .def("validate", &skv::EvictionConfig::validate);

  nb::class_<skv::MonitorConfig>(m, "MonitorConfig", "Settings of a Monitor.")
      .def(nb::init<>())
      .def_rw("eviction", &skv::MonitorConfig::eviction)
      .def_rw("head_budgets", &skv::MonitorConfig::head_budgets)
      .def_rw("solver", &skv::MonitorConfig::solver)
      .def_rw("walk_interval", &skv::MonitorConfig::walk_interval)
      .def_rw("top_fraction", &skv::MonitorConfig::top_fraction)
      .def_rw("row_stride", &skv::MonitorConfig::row_stride)
      .def_rw("prompt_rows", &skv::MonitorConfig::prompt_rows)
      .def("validate", &skv::MonitorConfig::validate);

  m.def("apply_preset", &skv::apply_preset, "name"_a, "graph"_a, "walk"_a,
        "Set edge law, top_k and the walk to a named choice.");
}
