// Rows of a whole prompt: checked against one thread block a row, then timed.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device/attention_row.cuh"
#include "cuda/device/row_tiles.cuh"
#include "cuda/kernels.h"
#include "harness.h"
#include "rows.cuh"

namespace {

using namespace spectralkv;  // NOLINT(google-build-using-namespace)
using spectralkv::bench::Buffer;
using spectralkv::cuda::check;
using spectralkv::cuda::LayerView;
using spectralkv::cuda::UpdateRowsArgs;

enum class Input { gaussian, spiky };

struct Shape {
  std::int64_t slots;
  int heads;
  int group;
  int dim;
  int top_k;
  std::int64_t row_stride;
  Input input;
  float softcap;
};

__device__ float gaussian(std::uint64_t at, std::uint64_t seed) {
  std::uint64_t x = (at + 1) * 0x9e3779b97f4a7c15ULL + seed * 0xd1342543de82ef95ULL;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebULL;
  x ^= x >> 31U;
  const float u = (static_cast<float>(x >> 40U) + 0.5F) * 0x1p-24F;
  const float v = static_cast<float>(x & 0xffffffU) * 0x1p-24F;
  return sqrtf(-2.0F * logf(u)) * cospif(2.0F * v);
}

/// (heads, slots, dim). Spiky: keys near their own queries, some that half of the heads look at
/// from everywhere, and four sinks in front.
template <class T>
__global__ void fill_kernel(T* out, std::int64_t slots, int dim, int group, bool queries,
                            Input input, std::uint64_t seed) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int d = static_cast<int>(i % dim);
  const std::int64_t slot = i / dim % slots;
  const auto head = static_cast<int>(i / dim / slots);
  float value = gaussian(static_cast<std::uint64_t>(i), seed + (queries ? 1 : 2));
  if (input == Input::spiky) {
    const int kv_head = queries ? head / group : head;
    const float axis =
        gaussian(static_cast<std::uint64_t>(kv_head * dim + d), seed + 3) > 0.0F ? 0.5F : -0.5F;
    const float rate = exp2f(-10.0F * static_cast<float>(d / 2) / static_cast<float>(dim / 2));
    value += 0.8F * cosf(static_cast<float>(slot) * rate + static_cast<float>(d % 2) * 1.5707963F);
    if (queries) {
      value += static_cast<float>(head % group % 2) * axis;
    } else if (slot < 4) {
      value += 8.0F * axis;
    } else if (gaussian(static_cast<std::uint64_t>(slot), seed + 4 + kv_head) > 2.3F) {
      value += 2.0F * axis;
    }
  }
  out[i] = static_cast<T>(value);
}

template <class T>
__global__ void __launch_bounds__(cuda::kRowThreads)
    plain_kernel(LayerView layer, UpdateRowsArgs args, std::int64_t first) {
  extern __shared__ float memory[];
  const std::int64_t token = first + blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  if (token >= args.count || args.drawn[token] == 0) return;
  const cuda::RowTask task{.sequence = 0,
                           .graph = g,
                           .own_slot = token,
                           .visible = token + 1,
                           .token = token,
                           .scale = args.scale,
                           .softcap = args.softcap};
  cuda::draw_row<T>(layer, args.queries, args.keys, task,
                    cuda::row_scratch(memory, layer.group, layer.head_dim),
                    cuda::row_of(layer, 0, g, token));
}

/// One layer of one sequence whose slots were all admitted.
template <class T>
struct Prompt {
  Shape shape;
  Buffer queries;
  Buffer keys;
  Buffer positions;
  Buffer rows;
  Buffer drawn;
  Buffer small;
  Buffer scratch;

  static LayerView view_of(const Shape& shape) {
    LayerView layer{};
    layer.batch = 1;
    layer.heads = shape.heads;
    layer.graphs = shape.heads;
    layer.heads_per_graph = 1;
    layer.group = shape.group;
    layer.head_dim = shape.dim;
    layer.top_k = shape.top_k;
    layer.law = EdgeLaw::weighted;
    layer.format = detail::row_format({}, shape.slots);
    layer.row_words = detail::words_of_row(layer.format, shape.top_k);
    layer.num_sinks = 4;
    layer.capacity = shape.slots;
    return layer;
  }
  static constexpr std::int64_t kDType = sizeof(T);

  Prompt(const Shape& wanted, std::uint64_t seed)
      : shape(wanted),
        queries(wanted.slots * wanted.heads * wanted.group * wanted.dim * kDType),
        keys(wanted.slots * wanted.heads * wanted.dim * kDType),
        positions(wanted.slots * wanted.heads * 4),
        rows(row_bytes()),
        drawn(wanted.slots * 4),
        small(4096),
        scratch(4 * cuda::update_rows_scratch(view_of(wanted), wanted.slots, wanted.slots,
                                              wanted.row_stride)) {
    constexpr unsigned kThreads = 256;
    const auto blocks = [&](std::int64_t n) { return static_cast<unsigned>(n / kThreads); };
    fill_kernel<T><<<blocks(queries.bytes() / kDType), kThreads>>>(
        queries.as<T>(), shape.slots, shape.dim, shape.group, true, shape.input, seed);
    fill_kernel<T><<<blocks(keys.bytes() / kDType), kThreads>>>(
        keys.as<T>(), shape.slots, shape.dim, shape.group, false, shape.input, seed);
    check(cudaGetLastError(), "fill_kernel");
    std::vector<std::int32_t> host(static_cast<std::size_t>(shape.slots * shape.heads));
    for (std::size_t i = 0; i < host.size(); ++i) {
      host[i] = static_cast<std::int32_t>(static_cast<std::int64_t>(i) % shape.slots);
    }
    upload(positions, host);
    host.resize(static_cast<std::size_t>(shape.slots));
    for (std::int64_t i = 0; i < shape.slots; ++i) {
      host[static_cast<std::size_t>(i)] = (shape.slots - 1 - i) % shape.row_stride == 0 ? 1 : 0;
    }
    upload(drawn, host);
    check(cudaMemset(small.as<void>(), 0, 4096), "cudaMemset");
    check(cudaMemset(scratch.as<void>(), 0, static_cast<std::size_t>(scratch.bytes())),
          "cudaMemset");
    clear();
  }
  static void upload(Buffer& to, const std::vector<std::int32_t>& from) {
    check(cudaMemcpy(to.as<void>(), from.data(), from.size() * 4, cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  std::int64_t row_bytes() const {
    return shape.slots * shape.heads * view_of(shape).row_words * 4;
  }
  void clear() const {
    check(cudaMemset(rows.as<void>(), 0xff, static_cast<std::size_t>(rows.bytes())), "cudaMemset");
  }
  LayerView layer() const {
    LayerView layer = view_of(shape);
    layer.positions = positions.as<std::int32_t>();
    layer.rows = rows.as<std::uint32_t>();
    layer.fault = small.as<cuda::FaultRecord>();
    layer.statistics = reinterpret_cast<cuda::Statistics*>(small.as<char>() + 512);
    return layer;
  }
  UpdateRowsArgs args() const {
    const DType dtype = sizeof(T) == 4              ? DType::f32
                        : std::is_same_v<T, __half> ? DType::f16
                                                    : DType::bf16;
    const std::int64_t plane = shape.slots * shape.dim;
    return {
        .queries = {queries.as<void>(), dtype, plane * shape.heads * shape.group, plane, shape.dim},
        .keys = {keys.as<void>(), dtype, plane * shape.heads, plane, shape.dim},
        .first_slot = 0,
        .count = shape.slots,
        .row_stride = shape.row_stride,
        .scale = 1.0F / std::sqrt(static_cast<float>(shape.dim)),
        .softcap = shape.softcap,
        .drawn = drawn.as<std::int32_t>(),
        .scratch = scratch.as<std::int32_t>()};
  }
  /// (heads, slots, 2 K): neighbours, then thresholds.
  std::vector<std::int32_t> download_rows() const {
    std::vector<std::uint32_t> host(static_cast<std::size_t>(row_bytes() / 4));
    check(cudaMemcpy(host.data(), rows.as<void>(), host.size() * 4, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return bench::unpacked(host, view_of(shape));
  }
  /// Rows that the first pass left over, and that neither settled.
  std::pair<std::int64_t, std::int64_t> left_over() const {
    const cuda::RowsScratch plan(view_of(shape), shape.slots, shape.slots, shape.row_stride);
    std::vector<std::int32_t> counts(
        static_cast<std::size_t>(cuda::RowsScratch::counters(view_of(shape))));
    check(cudaMemcpy(counts.data(), scratch.as<std::int32_t>() + plan.counts, counts.size() * 4,
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return {counts[counts.size() - 2], counts.back()};
  }
};

std::string name_of(const Shape& shape, const char* type) {
  char text[160];
  std::snprintf(text, sizeof(text), "B=1 S=%lld %s Hkv=%d group=%d D=%d K=%d stride=%lld %s%s",
                static_cast<long long>(shape.slots), type, shape.heads, shape.group, shape.dim,
                shape.top_k, static_cast<long long>(shape.row_stride),
                shape.input == Input::spiky ? "spiky" : "gaussian",
                shape.softcap > 0.0F ? " softcap" : "");
  return text;
}

template <class T>
float host_value(const T* at) {
  if constexpr (std::is_same_v<T, __half>) return __half2float(*at);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(*at);
  if constexpr (std::is_same_v<T, float>) return *at;
}

/// Mean probabilities of a row in double precision.
template <class T>
std::vector<double> exact_row(const Prompt<T>& prompt, const std::vector<T>& queries,
                              const std::vector<T>& keys, std::int64_t g, std::int64_t token) {
  const Shape& shape = prompt.shape;
  const UpdateRowsArgs args = prompt.args();
  std::vector<double> mean(static_cast<std::size_t>(token + 1), 0.0);
  std::vector<double> scores(mean.size());
  for (int q = 0; q < shape.group; ++q) {
    double highest = -INFINITY;
    const T* query = &queries[static_cast<std::size_t>(
        ((g * shape.group + q) * shape.slots + token) * shape.dim)];
    for (std::int64_t j = 0; j <= token; ++j) {
      const T* key = &keys[static_cast<std::size_t>((g * shape.slots + j) * shape.dim)];
      double dot = 0.0;
      for (int d = 0; d < shape.dim; ++d) {
        dot +=
            static_cast<double>(host_value(query + d)) * static_cast<double>(host_value(key + d));
      }
      dot *= static_cast<double>(args.scale);
      if (args.softcap > 0.0F) {
        dot =
            static_cast<double>(args.softcap) * std::tanh(dot / static_cast<double>(args.softcap));
      }
      scores[static_cast<std::size_t>(j)] = dot;
      highest = std::max(highest, dot);
    }
    double total = 0.0;
    for (double& score : scores) total += score = std::exp(score - highest);
    for (std::size_t j = 0; j < mean.size(); ++j) mean[j] += scores[j] / total / shape.group;
  }
  return mean;
}

template <class T>
bool verify(const Shape& shape, const char* type, std::uint64_t seed) {
  Prompt<T> prompt(shape, seed);
  const LayerView layer = prompt.layer();
  const UpdateRowsArgs args = prompt.args();
  const std::int64_t bytes = cuda::row_scratch_bytes(layer);
  check(cudaFuncSetAttribute(plain_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  plain_kernel<T><<<static_cast<unsigned>(shape.slots * shape.heads), cuda::kRowThreads,
                    static_cast<std::size_t>(bytes)>>>(layer, args, 0);
  check(cudaDeviceSynchronize(), "plain_kernel");
  const std::vector<std::int32_t> want = prompt.download_rows();
  prompt.clear();
  cuda::launch_update_rows(layer, args, nullptr);
  check(cudaDeviceSynchronize(), "launch_update_rows");
  const std::vector<std::int32_t> got = prompt.download_rows();

  std::vector<T> queries;
  std::vector<T> keys;
  const auto download = [](std::vector<T>& to, const Buffer& from) {
    to.resize(static_cast<std::size_t>(from.bytes()) / sizeof(T));
    check(cudaMemcpy(to.data(), from.as<void>(), to.size() * sizeof(T), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
  };
  std::int64_t rows = 0;
  std::int64_t differ = 0;
  std::int64_t wrong = 0;
  double worst_threshold = 0.0;
  const int k = shape.top_k;
  for (std::int64_t g = 0; g < shape.heads; ++g) {
    for (std::int64_t token = 0; token < shape.slots; ++token) {
      const std::size_t at = static_cast<std::size_t>((g * shape.slots + token) * 2 * k);
      if ((shape.slots - 1 - token) % shape.row_stride != 0) {
        if (got[at] != -1 || want[at] != -1) ++wrong;
        continue;
      }
      ++rows;
      std::vector<std::int32_t> a(want.begin() + at, want.begin() + at + k);
      std::vector<std::int32_t> c(got.begin() + at, got.begin() + at + k);
      if (a == c) {
        for (int i = 0; i < k && a[i] >= 0; ++i) {
          worst_threshold =
              std::max(worst_threshold,
                       std::abs(static_cast<double>(static_cast<std::uint32_t>(want[at + k + i])) -
                                static_cast<double>(static_cast<std::uint32_t>(got[at + k + i]))) *
                           0x1p-32);
        }
        continue;
      }
      ++differ;
      constexpr std::int64_t kMostLooks = 40;
      if (differ > kMostLooks) continue;
      if (queries.empty()) {
        download(queries, prompt.queries);
        download(keys, prompt.keys);
      }
      // The same but for rounding: place for place as probable.
      const std::vector<double> exact = exact_row(prompt, queries, keys, g, token);
      double gap = 0.0;
      for (int i = 0; i < k; ++i) {
        if (a[i] < 0 || c[i] < 0 || c[i] > token) {
          if (a[i] != c[i]) gap = 1.0;
          continue;
        }
        gap = std::max(gap, std::abs(exact[a[i]] - exact[c[i]]) / exact[a[i]]);
      }
      if (gap > 2e-5) {
        ++wrong;
        if (wrong <= 3) {
          std::printf("  graph %d token %d: gap %g\n   want", static_cast<int>(g),
                      static_cast<int>(token), gap);
          for (int i = 0; i < k; ++i) std::printf(" %d", a[i]);
          std::printf("\n   got ");
          for (int i = 0; i < k; ++i) std::printf(" %d", c[i]);
          std::printf("\n");
        }
      }
    }
  }
  const auto [again, unsettled] = prompt.left_over();
  std::printf(
      "%s %s: rows %lld, order or set differs %lld, wrong %lld, threshold off by %.2g, "
      "second pass %.3f %%, unsettled %.4f %%\n",
      wrong == 0 ? "ok  " : "FAIL", name_of(shape, type).c_str(), static_cast<long long>(rows),
      static_cast<long long>(differ), static_cast<long long>(wrong), worst_threshold,
      100.0 * static_cast<double>(again) / static_cast<double>(rows),
      100.0 * static_cast<double>(unsettled) / static_cast<double>(rows));
  std::fflush(stdout);
  return wrong == 0;
}

template <class T>
void time_rows(const Shape& shape, const char* type) {
  Prompt<T> prompt(shape, 7);
  const LayerView layer = prompt.layer();
  const UpdateRowsArgs args = prompt.args();
  const bench::Timing timing = bench::measure(
      {.calls = 1, .warm_up = 2, .replays = 7},
      [&](int, cudaStream_t stream) { cuda::launch_update_rows(layer, args, stream); });
  double useful = 0.0;
  for (std::int64_t t = shape.slots; t > 0; t -= shape.row_stride) {
    useful += 2.0 * shape.heads * shape.group * shape.dim * static_cast<double>(t);
  }
  const auto [again, unsettled] = prompt.left_over();
  const double rows =
      static_cast<double>((shape.slots + shape.row_stride - 1) / shape.row_stride) * shape.heads;
  bench::print("update_rows", name_of(shape, type), timing,
               {{"tflops", useful / timing.median * 1e-6},
                {"second_pass_share", static_cast<double>(again) / rows},
                {"unsettled_share", static_cast<double>(unsettled) / rows}});
}

bool verify_all(std::uint64_t seed) {
  using bf16 = __nv_bfloat16;
  bool right = true;
  for (const Input input : {Input::gaussian, Input::spiky}) {
    right &= verify<bf16>({100, 2, 4, 128, 8, 1, input, 0.0F}, "bf16", seed);
    right &= verify<bf16>({4096, 4, 4, 128, 32, 1, input, 0.0F}, "bf16", seed);
    right &= verify<__half>({2500, 2, 8, 64, 8, 1, input, 0.0F}, "f16", seed);
    right &= verify<bf16>({8192, 2, 4, 128, 8, 8, input, 0.0F}, "bf16", seed);
    right &= verify<bf16>({3000, 2, 3, 80, 16, 1, input, 30.0F}, "bf16", seed);
    right &= verify<bf16>({3000, 2, 1, 96, 4, 1, input, 0.0F}, "bf16", seed);
    right &= verify<__half>({1000, 1, 16, 256, 16, 1, input, 0.0F}, "f16", seed);
    right &= verify<bf16>({2000, 2, 2, 256, 32, 3, input, 0.0F}, "bf16", seed);
    right &= verify<float>({600, 2, 4, 128, 8, 1, input, 0.0F}, "f32", seed);
  }
  return right;
}

void time_all() {
  using bf16 = __nv_bfloat16;
  for (const Input input : {Input::gaussian, Input::spiky}) {
    for (const std::int64_t slots : {16384, 4096, 65536}) {
      time_rows<bf16>({slots, 8, 4, 128, 8, 1, input, 0.0F}, "bf16");
    }
    time_rows<bf16>({16384, 8, 4, 128, 32, 1, input, 0.0F}, "bf16");
    time_rows<bf16>({16384, 8, 4, 128, 8, 8, input, 0.0F}, "bf16");
    time_rows<bf16>({16384, 8, 4, 64, 8, 1, input, 0.0F}, "bf16");
    time_rows<bf16>({16384, 4, 8, 128, 8, 1, input, 0.0F}, "bf16");
  }
}

}  // namespace

/// bench_rows [check|time] [seed]: both by default.
int main(int count, char** arguments) {
  try {
    const std::string_view mode = count > 1 ? arguments[1] : "";
    const auto seed = static_cast<std::uint64_t>(count > 2 ? std::atoll(arguments[2]) : 1);
    const bool right = mode == "time" || verify_all(seed);
    if (mode != "check") time_all();
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
