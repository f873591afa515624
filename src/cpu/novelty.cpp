// Restart weights of novelty populations: how far a key points from where the keys of its head
// point on average.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

/// The weight of the most novel token. Integers make a restart exact: the same weights give the
/// same restarts on every device.
constexpr double kUnit = 0x1p20;

/// Adds to `sums` the z-scores of -cos(key, mean direction) of one head; -inf where there is no
/// finite key.
void add_z_scores(const CpuContext& context, const RotaryTable& rotary, const std::byte* keys,
                  DType dtype, std::int64_t stride, std::int64_t length,
                  const std::int32_t* positions, Scratch& scratch, double* sums) {
  const std::int64_t dim = context.graph.head_dim;
  if (!rotary.empty()) {
    float* const plain = scratch.panel.at_least(length * dim);
    for (std::int64_t j = 0; j < length; ++j) {
      float* const key = plain + j * dim;
      context.simd.load_row(keys + j * stride * size_of(dtype), dtype, dim, key);
      if (positions[j] >= 0) rotary.unturn(key, positions[j]);
    }
    keys = reinterpret_cast<const std::byte*>(plain);
    dtype = DType::f32;
    stride = dim;
  }
  float* const inverse_norms = scratch.sums.at_least(length);
  float* const mean = scratch.queries.at_least(dim);
  float* const distance = scratch.scores.at_least(length);
  std::fill_n(mean, dim, 0.0F);
  context.simd.sum_directions(keys, dtype, stride, length, dim, positions, mean, inverse_norms);
  double norm2 = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) norm2 += static_cast<double>(mean[d]) * mean[d];
  const float inverse = norm2 > 0.0 ? static_cast<float>(1.0 / std::sqrt(norm2)) : 0.0F;
  for (std::int64_t d = 0; d < dim; ++d) mean[d] *= inverse;
  context.simd.dot_keys(keys, dtype, stride, length, dim, mean, 1, distance, length);

  double sum = 0.0;
  std::int64_t count = 0;
  for (std::int64_t j = 0; j < length; ++j) {
    if (inverse_norms[j] < 0.0F) continue;
    distance[j] *= -inverse_norms[j];
    sum += distance[j];
    ++count;
  }
  const double average = count > 0 ? sum / static_cast<double>(count) : 0.0;
  double squares = 0.0;
  for (std::int64_t j = 0; j < length; ++j) {
    if (inverse_norms[j] < 0.0F) continue;
    squares += (distance[j] - average) * (distance[j] - average);
  }
  const double deviation = count > 1 ? std::sqrt(squares / static_cast<double>(count - 1)) : 0.0;
  for (std::int64_t j = 0; j < length; ++j) {
    if (inverse_norms[j] < 0.0F) {
      sums[j] = -std::numeric_limits<double>::infinity();
    } else if (deviation > 1e-6) {
      sums[j] += (distance[j] - average) / deviation;
    }
  }
}

/// Gives each token that may be restarted at the mean weight of those that lie at most `reach`
/// positions from it and may be, too.
/// `tokens`: their slots, as their positions ascend; `own` has room for as many weights.
void share_weights(const std::int32_t* positions, std::span<const std::int32_t> tokens,
                   std::int64_t reach, std::uint32_t* weights, std::uint32_t* own) {
  for (std::size_t i = 0; i < tokens.size(); ++i) own[i] = weights[tokens[i]];
  std::size_t first = 0;  // of those near a token, and behind them: both only advance
  std::size_t last = 0;
  std::uint64_t sum = 0;
  for (const std::int32_t slot : tokens) {
    const std::int64_t position = positions[slot];
    for (; last < tokens.size() && positions[tokens[last]] <= position + reach; ++last) {
      sum += own[last];
    }
    for (; positions[tokens[first]] < position - reach; ++first) sum -= own[first];
    const std::uint64_t count = last - first;
    weights[slot] = static_cast<std::uint32_t>((sum + count / 2) / count);
  }
}

}  // namespace

RotaryTable::RotaryTable(const Rotary& rotary) : rotary_(rotary) {
  if (empty()) return;
  for (std::int64_t rest = 0; rest < kStep; ++rest) {
    const std::vector<Turn> turns = turns_at(rotary_, static_cast<double>(rest));
    rests_.insert(rests_.end(), turns.begin(), turns.end());
  }
}

std::vector<RotaryTable::Turn> RotaryTable::turns_at(const Rotary& rotary, double position) {
  std::vector<Turn> turns;
  for (const double frequency : rotary.inv_freq) {
    const double angle = position * frequency;
    turns.push_back(
        {.cos = static_cast<float>(std::cos(angle)), .sin = static_cast<float>(std::sin(angle))});
  }
  return turns;
}

void RotaryTable::reserve(std::int64_t count) {
  const std::size_t pairs = rotary_.inv_freq.size();
  if (pairs == 0) return;
  for (auto step = static_cast<std::int64_t>(steps_.size() / pairs); step * kStep < count; ++step) {
    const std::vector<Turn> turns = turns_at(rotary_, static_cast<double>(step * kStep));
    steps_.insert(steps_.end(), turns.begin(), turns.end());
  }
}

void RotaryTable::unturn(float* key, std::int64_t position) const {
  const std::size_t pairs = rotary_.inv_freq.size();
  const Turn* const step = steps_.data() + static_cast<std::size_t>(position / kStep) * pairs;
  const Turn* const rest = rests_.data() + static_cast<std::size_t>(position % kStep) * pairs;
  const std::size_t apart = rotary_.interleaved ? 1 : pairs;
  const std::size_t stride = rotary_.interleaved ? 2 : 1;
  for (std::size_t i = 0; i < pairs; ++i) {
    const float cos = step[i].cos * rest[i].cos - step[i].sin * rest[i].sin;
    const float sin = step[i].sin * rest[i].cos + step[i].cos * rest[i].sin;
    float& first = key[i * stride];
    float& second = key[i * stride + apart];
    const float turned = first;
    first = turned * cos + second * sin;
    second = second * cos - turned * sin;
  }
}

void update_novelty(const CpuContext& context, const RotaryTable& rotary, CpuLayer& layer,
                    const ConstTensorView& keys, std::int64_t most_slots,
                    std::vector<Scratch>& scratch) {
  const int threads = context.threads_for(layer.batch() * context.graph.num_kv_heads * most_slots *
                                          context.graph.head_dim * 2);
  parallel_for(layer.batch() * layer.graphs(), threads, [&](std::int64_t task, int worker) {
    const std::int64_t b = task / layer.graphs();
    const std::int64_t g = task % layer.graphs();
    const std::int32_t* positions = layer.positions(b, g);
    const std::int64_t length = layer.extent(g, most_slots);
    Scratch& mine = scratch[static_cast<std::size_t>(worker)];
    double* const z = mine.z_scores.at_least(length);
    std::fill_n(z, length, 0.0);
    for (std::int64_t h = context.first_head(g); h < context.first_head(g) + context.head_count();
         ++h) {
      add_z_scores(context, rotary, layer.slots(keys, b, h), keys.dtype, keys.stride(2), length,
                   positions, mine, z);
    }
    const auto heads = static_cast<double>(context.head_count());
    double highest = -std::numeric_limits<double>::infinity();
    const auto may_restart = [&](std::int64_t j) {
      return positions[j] >= context.graph.num_sinks && std::isfinite(z[j]);
    };
    for (std::int64_t j = 0; j < length; ++j) {
      if (may_restart(j)) highest = std::max(highest, z[j]);
    }
    std::uint32_t* weights = layer.novelty(b, g);
    std::int32_t* const slots = mine.slots.at_least(length);
    std::size_t count = 0;
    for (std::int64_t j = 0; j < length; ++j) {
      weights[j] = 0;
      if (!may_restart(j)) continue;
      weights[j] =
          static_cast<std::uint32_t>(std::lround(kUnit * std::exp((z[j] - highest) / heads)));
      slots[count++] = static_cast<std::int32_t>(j);
    }
    if (context.walk.novelty_width == 1) return;
    // Slots need not follow the text.
    const auto older = [&](std::int32_t x, std::int32_t y) { return positions[x] < positions[y]; };
    if (!std::is_sorted(slots, slots + count, older)) std::sort(slots, slots + count, older);
    share_weights(positions, {slots, count}, context.walk.novelty_width / 2, weights,
                  mine.words.at_least(length));
  });
}

}  // namespace spectralkv::detail
