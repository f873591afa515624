#include "spectralkv/config.h"

#include <cmath>
#include <limits>
#include <string>

#include "backend.h"
#include "spectralkv/error.h"
#include "validate.h"

namespace spectralkv {
namespace {

using detail::check_range;
using detail::throw_invalid;

// Slots and positions are 32-bit integers throughout.
constexpr std::int64_t kMaxSlots = std::numeric_limits<std::int32_t>::max();
// The CUDA backend looks every position of the width up.
constexpr std::int64_t kMostNoveltyWidth = 1023;

void check_fraction(std::string_view operation, std::string_view what, double value, bool zero_ok) {
  if ((zero_ok ? value >= 0.0 : value > 0.0) && value <= 1.0) return;
  throw_invalid(operation, what, zero_ok ? "in [0, 1]" : "in (0, 1]", std::to_string(value));
}

}  // namespace

void GraphConfig::validate() const {
  constexpr std::string_view kOperation = "GraphConfig";
  check_range(kOperation, "num_layers", num_layers, 1, 1 << 20);
  check_range(kOperation, "batch_size", batch_size, 1, 1 << 20);
  check_range(kOperation, "num_kv_heads", num_kv_heads, 1, 1 << 20);
  check_range(kOperation, "num_query_heads", num_query_heads, 1, 1 << 20);
  if (num_query_heads % num_kv_heads != 0) {
    throw_invalid(kOperation, "num_query_heads",
                  "a multiple of num_kv_heads (" + std::to_string(num_kv_heads) + ")",
                  std::to_string(num_query_heads));
  }
  check_range(kOperation, "head_dim", head_dim, 1, 1 << 16);
  check_range(kOperation, "capacity", capacity, 0, kMaxSlots);
  if (top_k != 4 && top_k != 8 && top_k != 16 && top_k != 32) {
    throw_invalid(kOperation, "top_k", "4, 8, 16 or 32", std::to_string(top_k));
  }
  check_range(kOperation, "num_sinks", num_sinks, 0, kMaxSlots);
  check_range(kOperation, "total_kv_heads", total_kv_heads, 0, 1 << 20);
  const std::int64_t total = total_kv_heads == 0 ? num_kv_heads : total_kv_heads;
  check_range(kOperation, "head_offset", head_offset, 0, total - num_kv_heads);
  check_range(kOperation, "num_threads", num_threads, 0, 4096);
  check_range(kOperation, "device.index", device.index, 0,
              device.type == DeviceType::cpu ? 0 : 4096);
  check_range(kOperation, "twice the number of rotary.inv_freq",
              2 * static_cast<std::int64_t>(rotary.inv_freq.size()), 0, head_dim);
  for (const double frequency : rotary.inv_freq) {
    if (!std::isfinite(frequency)) {
      throw_invalid(kOperation, "rotary.inv_freq", "finite", std::to_string(frequency));
    }
  }
}

void WalkConfig::validate() const {
  constexpr std::string_view kOperation = "WalkConfig";
  check_range(kOperation, "num_walkers", num_walkers, 1, std::int64_t{1} << 30);
  check_range(kOperation, "walk_length", walk_length, 1, 1 << 20);
  check_fraction(kOperation, "restart_prob", restart_prob, false);
  check_fraction(kOperation, "decay", decay, true);
  check_range(kOperation, "novelty_width", novelty_width, 1, kMostNoveltyWidth);
  if (novelty_width % 2 == 0) {
    throw_invalid(kOperation, "novelty_width", "an odd number", std::to_string(novelty_width));
  }
  check_range(kOperation, "the number of populations",
              static_cast<std::int64_t>(populations.size()), 1, kMaxPopulations);
  double total = 0.0;
  for (const Population& population : populations) {
    check_fraction(kOperation, "share", population.share, false);
    check_fraction(kOperation, "recent_fraction", population.recent_fraction, false);
    check_range(kOperation, "recent_tokens", population.recent_tokens, 0, kMaxSlots);
    if (population.decay)
      check_fraction(kOperation, "a population's decay", *population.decay, true);
    total += population.share;
  }
  if (std::abs(total - 1.0) > 1e-6) {
    throw_invalid(kOperation, "the sum of shares", "1", std::to_string(total));
  }
  check_range(kOperation, "num_walkers", num_walkers, static_cast<std::int64_t>(populations.size()),
              std::int64_t{1} << 30);
  if (detail::populations_of(*this, Solver::exact).empty()) return;
  for (int p = 0; p < static_cast<int>(populations.size()); ++p) {
    if (detail::walkers_of(*this, p).count > 0) continue;
    throw_invalid(kOperation, "the share of each population, where one is exact,",
                  "at least 1 of num_walkers (" + std::to_string(num_walkers) +
                      "), which are the unit of scores",
                  std::to_string(populations[static_cast<std::size_t>(p)].share));
  }
}

bool WalkConfig::needs_novelty() const {
  for (const Population& population : populations) {
    if (population.restart == Restart::novelty) return true;
  }
  return false;
}

void EvictionConfig::validate() const {
  constexpr std::string_view kOperation = "EvictionConfig";
  check_range(kOperation, "window", window, 0, kMaxSlots);
  check_range(kOperation, "sinks", sinks, 0, kMaxSlots);
  check_range(kOperation, "interval", interval, 1, kMaxSlots);
  const std::int64_t least = sinks + window + 1;
  const auto check_budget = [&](std::string_view what, std::int64_t tokens) {
    if (tokens < least) {
      throw_invalid(kOperation, what, "at least sinks + window + 1 = " + std::to_string(least),
                    std::to_string(tokens));
    }
    check_range(kOperation, what, tokens, least, kMaxSlots - interval);
  };
  check_budget("budget", budget);
  for (const std::int64_t tokens : head_budgets) check_budget("a head's budget", tokens);
}

void apply_preset(std::string_view name, GraphConfig& graph, WalkConfig& walk) {
  const WalkConfig defaults;
  const auto set = [&](EdgeLaw law, int top_k, double restart_prob, double decay,
                       std::vector<Population> populations) {
    graph.edge_law = law;
    graph.top_k = top_k;
    walk.restart_prob = restart_prob;
    walk.decay = decay;
    walk.novelty_width = defaults.novelty_width;
    walk.populations = std::move(populations);
  };
  if (name == "default") {
    set(EdgeLaw::weighted, GraphConfig{}.top_k, defaults.restart_prob, defaults.decay,
        defaults.populations);
  } else if (name == "walks") {
    std::vector<Population> populations = defaults.populations;
    for (Population& population : populations) population.solver = Solver::walk;
    set(EdgeLaw::weighted, GraphConfig{}.top_k, defaults.restart_prob, defaults.decay,
        std::move(populations));
  } else if (name == "uniform32") {
    set(EdgeLaw::uniform, 32, 0.85, 1.0, {{.restart = Restart::current, .count = VisitCount::all}});
  } else if (name == "weighted4") {
    set(EdgeLaw::weighted, 4, 0.15, 0.0,
        {{.restart = Restart::recent, .count = VisitCount::edges}});
  } else {
    throw_invalid("apply_preset", "name", R"("default", "walks", "uniform32" or "weighted4")",
                  std::string("\"").append(name).append("\""));
  }
}

}  // namespace spectralkv
