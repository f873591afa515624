// Attention of one new token a sequence with its row of the graph: against references, then against
// the memory's bandwidth and against attention alone.
//
//   bench_attend [check | time]    (default: check, then time)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cuda/clusters.h"
#include "cuda/kernels.h"
#include "harness.h"
#include "layer.cuh"

namespace spectralkv::bench {
namespace {

/// A layer with values.
class Attended {
 public:
  Attended(const Shape& shape, std::uint32_t seed)
      : shape_(shape),
        layer(shape, seed),
        values_(shape.batch * shape.heads * (shape.length + Layer::kRoom) * shape.dim *
                size_of(shape.dtype)),
        new_token_(shape.batch * shape.heads * shape.dim * size_of(shape.dtype)),
        slots_(std::int64_t{4} * shape.batch * shape.heads),
        out_(shape.batch * shape.heads * shape.group * shape.dim * size_of(shape.dtype)) {
    fill(values_.as<void>(), shape.dtype, values_.bytes() / size_of(shape.dtype), seed + 2, 1.0F);
    fill(new_token_.as<void>(), shape.dtype, new_token_.bytes() / size_of(shape.dtype), seed + 3,
         1.0F);
  }

  void attend(std::int64_t extent, cudaStream_t stream) const {
    launch_attend(layer.view(), args(), extent, {}, stream);
  }
  void place(cudaStream_t stream) const {
    const TokensView new_token{.data = new_token_.as<void>(),
                               .dtype = shape_.dtype,
                               .sequence_stride = std::int64_t{shape_.heads} * shape_.dim,
                               .head_stride = shape_.dim,
                               .token_stride = shape_.dim};
    launch_place(layer.view(),
                 {.new_keys = new_token,
                  .new_values = new_token,
                  .keys = layer.keys(),
                  .values = args().values,
                  .slots = {.data = slots_.as<std::int32_t>(),
                            .sequence_stride = shape_.heads,
                            .head_stride = 1,
                            .slot_stride = 1},
                  .num_slots = shape_.length + Layer::kRoom,
                  .key_dim = shape_.dim,
                  .value_dim = shape_.dim},
                 stream);
  }
  /// What a layer does with a token that is decoded: it takes a free slot, and attends.
  void step(std::int64_t extent, cudaStream_t stream) const {
    place(stream);
    AttendArgs all = args();
    all.update.slots = {.data = slots_.as<const std::int32_t>(),
                        .sequence_stride = shape_.heads,
                        .head_stride = 1,
                        .slot_stride = 1};
    launch_attend(layer.view(), all, extent, {}, stream);
  }
  void attend_alone(cudaStream_t stream) const {
    launch_decode_attention({.batch = shape_.batch,
                             .heads = shape_.heads,
                             .group = shape_.group,
                             .head_dim = shape_.dim,
                             .length = shape_.length,
                             .positions = {}},
                            args(), stream);
  }

  /// What attention over slots [0, n) gives for query head q of sequence b, but for those with a
  /// negative position; `positions` may be shorter.
  std::vector<double> reference(int b, int q, std::int64_t n,
                                const std::vector<std::int32_t>& positions) const {
    const std::int64_t capacity = shape_.length + Layer::kRoom;
    const std::int64_t head = std::int64_t{b} * shape_.heads + q / shape_.group;
    const std::int64_t dim = shape_.dim;
    const std::vector<double> keys = layer.host(layer.key_buffer(), head * capacity * dim, n * dim);
    const std::vector<double> values = layer.host(values_, head * capacity * dim, n * dim);
    const std::vector<double> query = layer.host(
        layer.query_buffer(), (std::int64_t{b} * shape_.heads * shape_.group + q) * dim, dim);
    std::vector<double> scores(static_cast<std::size_t>(n));
    double highest = -INFINITY;
    for (std::int64_t j = 0; j < n; ++j) {
      const auto i = static_cast<std::size_t>(j);
      double dot = 0.0;
      for (std::int64_t d = 0; d < dim; ++d) {
        dot += query[static_cast<std::size_t>(d)] * keys[static_cast<std::size_t>(j * dim + d)];
      }
      dot *= static_cast<double>(layer.args().scale);
      if (shape_.softcap > 0.0F) dot = shape_.softcap * std::tanh(dot / shape_.softcap);
      scores[i] = i < positions.size() && positions[i] < 0 ? -INFINITY : dot;
      highest = std::max(highest, scores[i]);
    }
    double sum = 0.0;
    for (double& score : scores) sum += score = std::exp(score - highest);
    std::vector<double> mean(static_cast<std::size_t>(dim));
    for (std::int64_t j = 0; j < n; ++j) {
      const double weight = scores[static_cast<std::size_t>(j)] / sum;
      for (std::int64_t d = 0; d < dim; ++d) {
        mean[static_cast<std::size_t>(d)] += weight * values[static_cast<std::size_t>(j * dim + d)];
      }
    }
    return mean;
  }
  std::vector<double> out(int b, int q) const {
    return layer.host(out_, (std::int64_t{b} * shape_.heads * shape_.group + q) * shape_.dim,
                      shape_.dim);
  }

 private:
  AttendArgs args() const {
    TokensView values = layer.keys();
    values.data = values_.as<void>();
    return {.update = layer.args(),
            .values = values,
            .out = {.data = out_.as<void>(),
                    .sequence_stride = std::int64_t{shape_.heads} * shape_.group * shape_.dim,
                    .head_stride = shape_.dim,
                    .slot_stride = 1}};
  }

  Shape shape_;

 public:
  Layer layer;

 private:
  Buffer values_, new_token_, slots_, out_;
};

bool sound = true;

void expect(bool good, const std::string& what) {
  if (good) return;
  sound = false;
  std::printf("WRONG %s\n", what.c_str());
}

double worst_error(const Attended& attended, const Shape& shape, std::int64_t n,
                   const std::vector<std::int32_t>& positions) {
  double worst = 0.0;
  for (const int b : {0, shape.batch - 1}) {
    for (const int q : {0, shape.heads * shape.group - 1}) {
      const std::vector<double> wanted = attended.reference(b, q, n, positions);
      const std::vector<double> actual = attended.out(b, q);
      for (std::size_t d = 0; d < wanted.size(); ++d) {
        const double error = std::abs(actual[d] - wanted[d]);
        worst = error <= worst ? worst : error;  // NaN is the worst
      }
    }
  }
  return worst;
}

/// The output against double precision, the row against that of an update alone.
void check_shape(const Shape& shape, int holes) {
  const std::string name = shape.name() + (holes != 0 ? " holes" : "");
  Attended attended(shape, static_cast<std::uint32_t>(shape.length * 13 + shape.dim));
  const std::vector<std::int32_t> positions = some_positions(shape, holes);
  attended.layer.set_positions(positions);
  const std::int64_t extent = shape.length + 1;
  const auto sorted_rows = [&] {
    check(cudaDeviceSynchronize(), name.c_str());
    std::vector<std::int32_t> rows = attended.layer.new_rows();
    attended.layer.rewind();
    for (std::size_t i = 0; i < rows.size(); i += static_cast<std::size_t>(2 * shape.top_k)) {
      const auto first = rows.begin() + static_cast<std::ptrdiff_t>(i);
      std::sort(first, first + shape.top_k);
      std::fill(first + shape.top_k, first + std::ptrdiff_t{2} * shape.top_k, 0);
    }
    return rows;
  };
  const UpdatePlan plan = plan_update(attended.layer.view(), extent, {});
  launch_update(attended.layer.view(), attended.layer.args(), extent, plan, nullptr);
  const std::vector<std::int32_t> wanted = sorted_rows();
  attended.attend(extent, nullptr);
  expect(sorted_rows() == wanted, name + ": rows differ from those of an update");
  const double tolerance = shape.dtype == DType::f32   ? 1e-4
                           : shape.dtype == DType::f16 ? 4e-3
                                                       : 3e-2;
  const double error = worst_error(attended, shape, extent, positions);
  expect(error < tolerance, name + ": attention is off by " + std::to_string(error));
  attended.attend_alone(nullptr);
  check(cudaDeviceSynchronize(), name.c_str());
  const double alone = worst_error(attended, shape, shape.length, {});
  expect(alone < tolerance, name + ": attention alone is off by " + std::to_string(alone));
}

void check_all() {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const std::int64_t length : {1, 7, 16, 777, 4096}) {
      check_shape({.batch = 2, .heads = 2, .dtype = dtype, .length = length}, 0);
    }
    for (const int dim : {20, 64, 80, 96, 128, 256}) {
      for (const int group : {1, 3, 8, 16, 17}) {
        check_shape({.batch = 1,
                     .heads = 2,
                     .group = group,
                     .dim = dim,
                     .top_k = group == 3 ? 4 : 16,
                     .dtype = dtype,
                     .length = 1500},
                    group == 3 ? 50 : 0);
      }
    }
    check_shape({.batch = 2, .heads = 4, .dtype = dtype, .length = 2000, .shared_graph = true}, 10);
    check_shape({.batch = 1, .heads = 2, .dtype = dtype, .length = 2000, .softcap = 5.0F}, 10);
    check_shape({.batch = 1, .heads = 1, .dtype = dtype, .length = 65539}, 0);
    check_shape({.batch = 1, .heads = 1, .group = 16, .dtype = dtype, .length = 65539}, 0);
  }
  std::printf("checked: %s\n", sound ? "good" : "WRONG");
}

void time_shape(const Shape& shape, double bandwidth) {
  constexpr std::int64_t kCold = std::int64_t{256} << 20U;
  const std::int64_t bytes = 2 * shape.key_bytes();
  std::vector<std::unique_ptr<Attended>> layers;
  for (std::int64_t i = 0; i < std::clamp<std::int64_t>(kCold / bytes, 1, 16); ++i) {
    layers.push_back(std::make_unique<Attended>(shape, static_cast<std::uint32_t>(17 + i)));
  }
  const std::int64_t extent = shape.length + Layer::kRoom;
  const auto time = [&](const char* bench, std::int64_t read, auto&& work) {
    const Timing timing = measure(
        {.calls = static_cast<int>(layers.size()), .warm_up = 3, .replays = 25},
        [&](int call, auto stream) { work(*layers[static_cast<std::size_t>(call)], stream); });
    for (const auto& one : layers) one->layer.rewind();
    print_rate(bench, shape.name(), timing, static_cast<double>(read), bandwidth);
  };
  time("attend", bytes, [&](const Attended& one, auto stream) { one.attend(extent, stream); });
  time("place", 0, [](const Attended& one, auto stream) { one.place(stream); });
  time("step", bytes, [&](const Attended& one, auto stream) { one.step(extent, stream); });
  time("attention", bytes, [](const Attended& one, auto stream) { one.attend_alone(stream); });
  time("update_alone", bytes / 2, [&](const Attended& one, auto stream) {
    const UpdatePlan plan = plan_update(one.layer.view(), extent, {});
    launch_update(one.layer.view(), one.layer.args(), extent, plan, stream);
  });
}

int run(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "all";
  if (mode != "time") check_all();
  if (!sound || mode == "check") return sound ? 0 : 1;
  for (int cluster = 1; cluster <= kMostCluster; ++cluster) {
    std::printf("{\"bench\": \"clusters\", \"case\": \"%d blocks\", \"at_once\": %d}\n", cluster,
                clusters_at_once(cluster));
  }
  const double bandwidth = copy_bandwidth();
  for (const int batch : {1, 8}) {
    for (const std::int64_t length : {4096, 16384, 65536}) {
      time_shape({.batch = batch, .length = length}, bandwidth);
    }
  }
  for (const int group : {1, 8, 16}) {
    time_shape({.batch = 1, .group = group, .length = 16384}, bandwidth);
  }
  for (const int dim : {64, 96, 256}) {
    time_shape({.batch = 1, .dim = dim, .length = 16384}, bandwidth);
  }
  time_shape({.batch = 1, .dtype = DType::f32, .length = 16384}, bandwidth);
  time_shape({.batch = 1, .length = 16384, .shared_graph = true}, bandwidth);
  return 0;
}

}  // namespace
}  // namespace spectralkv::bench

int main(int count, char** arguments) {
  try {
    return spectralkv::bench::run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
