// The attention of one token a sequence: the parts of it that a row of the graph shares, the mean
// of the values, and both together without a graph.
#include <algorithm>
#include <bit>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

/// Slots of one task. Small enough to spread one long sequence over the threads.
constexpr std::int64_t kSlotsPerTask = 4096;

/// At least one, which writes what an empty cache gives.
std::int64_t splits_of(std::int64_t length) {
  return std::max<std::int64_t>((length + kSlotsPerTask - 1) / kSlotsPerTask, 1);
}

/// To nearest, ties to even.
std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  constexpr std::uint16_t kNan = 0x7fc0;
  if (value != value) return kNan;
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U);
}

std::uint16_t to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16U) & 0x8000U;
  std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<std::uint16_t>(sign | 0x7e00U);
  if (magnitude >= 0x47800000U) return static_cast<std::uint16_t>(sign | 0x7c00U);  // 2^16 and up
  if (magnitude < 0x38800000U) {  // below 2^-14: a multiple of 2^-24, which the sum rounds to
    const float rounded = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(rounded) - 0x3f000000U));
  }
  magnitude += 0xfffU + ((magnitude >> 13U) & 1U);
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000U) >> 13U));
}

/// dst[i] = src[i] in a floating type.
void store_row(const float* src, DType dtype, std::int64_t n, std::byte* dst) {
  if (dtype == DType::f32) {
    std::copy_n(src, n, reinterpret_cast<float*>(dst));
    return;
  }
  auto* words = reinterpret_cast<std::uint16_t*>(dst);
  std::transform(src, src + n, words, dtype == DType::f16 ? to_f16 : to_bf16);
}

}  // namespace

std::int64_t round_size(const CpuContext& context, std::int64_t batch, std::int64_t graphs) {
  return std::clamp<std::int64_t>((2 * std::int64_t{context.threads} + graphs - 1) / graphs, 1,
                                  std::max<std::int64_t>(batch, 1));
}

void score_keys(const CpuContext& context, const AttentionRound& round, float* queries,
                float* scores) {
  const GraphConfig& graph = context.graph;
  const std::int64_t dim = graph.head_dim;
  const std::int64_t group = context.group();
  const std::int64_t stride = round.keys.stride(2);
  const std::int64_t splits = splits_of(round.length);
  for (std::int64_t i = 0; i < round.count * graph.num_query_heads; ++i) {
    const std::int64_t b = round.first + i / graph.num_query_heads;
    const std::int64_t h = i % graph.num_query_heads;
    context.simd.load_row(head_pointer(round.queries, b, h), round.queries.dtype, dim,
                          queries + i * dim);
  }
  parallel_for(round.count * graph.num_kv_heads * splits,
               context.threads_for(round.operations(graph)), [&](std::int64_t task, int) {
                 const std::int64_t head = task / splits;  // of this round, over its sequences
                 const std::int64_t begin = task % splits * kSlotsPerTask;
                 const std::int64_t b = round.first + head / graph.num_kv_heads;
                 const std::int64_t h = head % graph.num_kv_heads;
                 const std::int64_t count =
                     std::min(kSlotsPerTask, round.slots_of(context.graph_of(h)) - begin);
                 if (count <= 0) return;
                 const auto* keys =
                     round.slots(round.keys, b, h) + begin * stride * size_of(round.keys.dtype);
                 context.simd.dot_keys(keys, round.keys.dtype, stride, count, dim,
                                       queries + head * group * dim, group,
                                       scores + head * group * round.length + begin, round.length);
               });
}

void weigh_values(const CpuContext& context, const AttentionRound& round,
                  const AttendedViews& attended, const PositionsOf& positions, const float* weights,
                  const float* totals, AlignedBuffer<float>& partial) {
  const GraphConfig& graph = context.graph;
  const std::int64_t dim = graph.head_dim;
  const std::int64_t group = context.group();
  const std::int64_t stride = attended.values.stride(2);
  const std::int64_t splits = splits_of(round.length);
  const std::int64_t heads = round.count * graph.num_kv_heads;
  const int threads = context.threads_for(round.operations(graph));
  float* const sums = partial.at_least(heads * splits * group * dim);  // (heads, splits, group, D)
  parallel_for(heads * splits, threads, [&](std::int64_t task, int) {
    const std::int64_t head = task / splits;
    const std::int64_t begin = task % splits * kSlotsPerTask;
    const std::int64_t b = round.first + head / graph.num_kv_heads;
    const std::int64_t h = head % graph.num_kv_heads;
    const std::int32_t* slots = positions(b, h);
    float* const own = sums + task * group * dim;
    std::fill_n(own, group * dim, 0.0F);
    const std::int64_t count = std::min(kSlotsPerTask, round.slots_of(context.graph_of(h)) - begin);
    if (count <= 0) return;
    context.simd.add_weighted_rows(
        round.slots(attended.values, b, h) + begin * stride * size_of(attended.values.dtype),
        attended.values.dtype, stride, count, dim, slots == nullptr ? nullptr : slots + begin,
        weights + head * group * round.length + begin, round.length, group, own);
  });
  for (std::int64_t head = 0; head < heads; ++head) {
    const std::int64_t b = round.first + head / graph.num_kv_heads;
    float* const first = sums + head * splits * group * dim;
    for (std::int64_t q = 0; q < group; ++q) {
      float* const sum = first + q * dim;
      for (std::int64_t split = 1; split < splits; ++split) {
        context.simd.add_scaled(sum, sum + split * group * dim, dim, 1.0F);
      }
      const float total = totals[head * group + q];
      for (std::int64_t d = 0; d < dim; ++d) sum[d] /= total;
      store_row(sum, attended.out.dtype, dim,
                head_pointer(attended.out, b, head % graph.num_kv_heads * group + q));
    }
  }
}

void decode_attention_on_cpu(const AttentionArgs& args) {
  GraphConfig graph;
  graph.num_query_heads = args.query.size(1);
  graph.num_kv_heads = args.keys.size(1);
  graph.head_dim = args.query.size(2);
  const WalkConfig walk;
  const CpuContext context{
      .graph = graph, .walk = walk, .simd = simd_kernels(), .threads = available_processors()};
  const SoftmaxArgs options{.scale = static_cast<float>(args.scale),
                            .softcap = static_cast<float>(args.softcap)};
  const ConstTensorView& marks = args.positions;
  const PositionsOf positions = [&](std::int64_t b, std::int64_t h) {
    return marks.empty()
               ? nullptr
               : element_pointer<std::int32_t>(marks, b * marks.stride(0) + h * marks.stride(1));
  };
  const std::int64_t batch = args.query.size(0);
  const std::int64_t at_once = round_size(context, batch, graph.num_kv_heads);
  AlignedBuffer<float> queries(at_once * graph.num_query_heads * graph.head_dim);
  AlignedBuffer<float> scores(at_once * graph.num_query_heads * args.length);
  AlignedBuffer<float> totals(at_once * graph.num_query_heads);
  AlignedBuffer<float> partial;
  for (std::int64_t first = 0; first < batch; first += at_once) {
    const AttentionRound round{.queries = args.query,
                               .keys = args.keys,
                               .first = first,
                               .count = std::min(at_once, batch - first),
                               .length = args.length};
    score_keys(context, round, queries.data(), scores.data());
    parallel_for(round.count * graph.num_query_heads, context.threads_for(round.operations(graph)),
                 [&](std::int64_t q, int) {
                   const std::int64_t b = first + q / graph.num_query_heads;
                   const std::int64_t h = q % graph.num_query_heads / context.group();
                   totals.data()[q] = softmax(context, options, scores.data() + q * args.length,
                                              args.length, positions(b, h));
                 });
    weigh_values(context, round, args.attended, positions, scores.data(), totals.data(), partial);
  }
}

}  // namespace spectralkv::detail
