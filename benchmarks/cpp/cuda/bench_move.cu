// Eviction on the GPU: choosing, moving, freeing and reusing slots, at the shapes of an 8B model's
// layer (8 KV heads of 128, bf16). Results are compared with the CPU backend's first; a difference
// ends the program with status 1.
//
// The limit of a move is a copy on the device: every kept byte is read once and written once.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "harness.h"
#include "spectralkv/graph_manager.h"

namespace spectralkv::bench {
namespace {

constexpr std::int64_t kHeads = 8;
constexpr std::int64_t kQueryHeads = 32;
constexpr std::int64_t kDim = 128;
constexpr std::int64_t kElement = 2;  // bytes of bf16
constexpr std::int64_t kTopK = 8;
/// More than twice the L2 cache of any GPU so far.
constexpr std::int64_t kFlushBytes = std::int64_t{320} << 20U;

const Device kCpu{};
const Device kGpu{.type = DeviceType::cuda, .index = 0};

/// Any finite bf16 values; the same on every call.
__global__ void fill_kernel(std::uint16_t* data, std::int64_t count, std::uint32_t seed) {
  std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    auto bits = static_cast<std::uint32_t>(i) * 2654435761U ^ seed;
    bits = (bits ^ (bits >> 16U)) * 0x85ebca6bU;
    bits = (bits ^ (bits >> 13U)) * 0xc2b2ae35U;
    data[i] = static_cast<std::uint16_t>((bits >> 16U & 0x807fU) | 0x3f00U);
  }
}

__global__ void differing_kernel(const uint4* one, const uint4* other, std::int64_t count,
                                 unsigned long long* differing) {
  unsigned long long mine = 0;
  std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    const uint4 a = one[i];
    const uint4 b = other[i];
    if (a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w) mine += sizeof(uint4);
  }
  if (mine != 0) atomicAdd(differing, mine);
}

void fill(const Buffer& buffer, std::uint32_t seed, cudaStream_t stream) {
  fill_kernel<<<1024, 256, 0, stream>>>(buffer.as<std::uint16_t>(), buffer.bytes() / kElement,
                                        seed);
  check(cudaGetLastError(), "fill_kernel");
}

template <class T>
Buffer to_device(const std::vector<T>& values) {
  Buffer buffer(static_cast<std::int64_t>(values.size() * sizeof(T)));
  check(cudaMemcpy(buffer.as<void>(), values.data(), values.size() * sizeof(T),
                   cudaMemcpyHostToDevice),
        "cudaMemcpy");
  return buffer;
}

template <class T>
std::vector<T> to_host(const Buffer& buffer) {
  std::vector<T> values(static_cast<std::size_t>(buffer.bytes()) / sizeof(T));
  check(cudaMemcpy(values.data(), buffer.as<void>(), values.size() * sizeof(T),
                   cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  return values;
}

TensorView view_of(void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                   Device device) {
  return {data, dtype, shape, device};
}

class TimingStream {
 public:
  TimingStream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~TimingStream() {
    static_cast<void>(cudaEventDestroy(begin_));
    static_cast<void>(cudaEventDestroy(end_));
    static_cast<void>(cudaStreamDestroy(stream_));
  }
  TimingStream(const TimingStream&) = delete;
  TimingStream& operator=(const TimingStream&) = delete;

  cudaStream_t get() const { return stream_; }
  Stream opaque() const { return {stream_}; }

  /// Microseconds of the device for one call of `work`, behind a flush of the L2 cache that also
  /// gives the host time to queue all of it.
  double time_cold(const std::function<void()>& work) {
    check(cudaMemsetAsync(flush_.as<void>(), 1, static_cast<std::size_t>(kFlushBytes), stream_),
          "cudaMemsetAsync");
    check(cudaMemsetAsync(flush_.as<void>(), 0, static_cast<std::size_t>(kFlushBytes), stream_),
          "cudaMemsetAsync");
    check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    work();
    check(cudaEventRecord(end_, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds = 0.0F;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return 1e3 * static_cast<double>(milliseconds);
  }

 private:
  Buffer flush_{kFlushBytes};
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

Timing summarize(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const auto quantile = [&](double q) {
    return times[static_cast<std::size_t>(q * static_cast<double>(times.size() - 1))];
  };
  return {.median = quantile(0.5), .low = quantile(0.25), .high = quantile(0.75)};
}

Timing measure_cold(TimingStream& timer, int repeats, const std::function<void()>& work) {
  std::vector<double> times;
  for (int i = 0; i < repeats + 2; ++i) {
    const double time = timer.time_cold(work);
    if (i >= 2) times.push_back(time);
  }
  return summarize(std::move(times));
}

/// Slots that stay of `length`, ascending: a random subset, or runs of 64 behind each other.
std::vector<std::int32_t> choose_kept(std::int64_t length, std::int64_t kept, bool runs,
                                      std::mt19937& random) {
  const std::int64_t run = runs ? 64 : 1;
  std::vector<std::int32_t> starts(static_cast<std::size_t>((length + run - 1) / run));
  std::iota(starts.begin(), starts.end(), 0);
  std::shuffle(starts.begin(), starts.end(), random);
  std::vector<std::int32_t> slots;
  for (const std::int32_t start : starts) {
    for (std::int64_t i = start * run; i < std::min(length, (start + 1) * run); ++i) {
      if (std::cmp_less(slots.size(), kept)) slots.push_back(static_cast<std::int32_t>(i));
    }
  }
  std::sort(slots.begin(), slots.end());
  return slots;
}

/// (B, Hkv, M): each head its own choice; sequence b keeps counts[b], right-aligned behind -1.
std::vector<std::int32_t> keep_table(std::int64_t length, const std::vector<std::int64_t>& counts,
                                     bool runs) {
  std::mt19937 random(7);
  const std::int64_t width = *std::max_element(counts.begin(), counts.end());
  std::vector<std::int32_t> table;
  for (const std::int64_t count : counts) {
    for (std::int64_t h = 0; h < kHeads; ++h) {
      table.insert(table.end(), static_cast<std::size_t>(width - count), -1);
      const std::vector<std::int32_t> slots = choose_kept(length, count, runs, random);
      table.insert(table.end(), slots.begin(), slots.end());
    }
  }
  return table;
}

/// Random edges to older slots for one sequence of `length` tokens.
struct RandomGraph {
  std::vector<std::int32_t> positions;
  std::vector<std::int32_t> neighbors;
  std::vector<float> probabilities;
  std::vector<std::uint32_t> novelty;

  explicit RandomGraph(std::int64_t length) {
    std::mt19937 random(3);
    for (std::int64_t h = 0; h < kHeads; ++h) {
      for (std::int64_t slot = 0; slot < length; ++slot) {
        positions.push_back(static_cast<std::int32_t>(slot));
        novelty.push_back(random() & 0xffffU);
        for (std::int64_t k = 0; k < kTopK; ++k) {
          neighbors.push_back(
              slot == 0 ? -1
                        : static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(slot)));
          probabilities.push_back(slot == 0 ? 0.0F : 1.0F / static_cast<float>(kTopK));
        }
      }
    }
  }
};

/// The same graph in host memory and on the device.
struct Inputs {
  std::int64_t length;
  RandomGraph host;
  Buffer positions;
  Buffer neighbors;
  Buffer probabilities;
  Buffer novelty;

  explicit Inputs(std::int64_t slots)
      : length(slots),
        host(slots),
        positions(to_device(host.positions)),
        neighbors(to_device(host.neighbors)),
        probabilities(to_device(host.probabilities)),
        novelty(to_device(host.novelty)) {}

  /// Every sequence of the layer becomes this graph.
  void load(GraphManager& manager, std::int64_t layer, std::int64_t batch, Device device) {
    const std::vector<std::int64_t> one{0};
    if (manager.batch_size(layer) != 1) manager.select_batch(layer, one);
    const auto view = [&](auto& values, const Buffer& buffer, DType dtype,
                          std::initializer_list<std::int64_t> shape) {
      return view_of(device == kCpu ? static_cast<void*>(values.data()) : buffer.as<void>(), dtype,
                     shape, device);
    };
    manager.load_rows(
        layer, view(host.positions, positions, DType::i32, {1, kHeads, length}),
        view(host.neighbors, neighbors, DType::i32, {1, kHeads, length, kTopK}),
        view(host.probabilities, probabilities, DType::f32, {1, kHeads, length, kTopK}));
    manager.load_restart_weights(layer,
                                 view(host.novelty, novelty, DType::u32, {1, kHeads, length}));
    if (batch == 1) return;
    const std::vector<std::int64_t> copies(static_cast<std::size_t>(batch), 0);
    manager.select_batch(layer, copies);
  }
};

GraphConfig graph_config(std::int64_t layers, std::int64_t capacity, Device device) {
  return {.num_layers = layers,
          .num_query_heads = kQueryHeads,
          .num_kv_heads = kHeads,
          .head_dim = kDim,
          .capacity = capacity,
          .top_k = static_cast<int>(kTopK),
          .device = device};
}

/// Fails the program where the two backends differ.
class Comparison {
 public:
  template <class T>
  void equal(const std::string& what, const std::vector<T>& cpu, const std::vector<T>& gpu) {
    const auto pair = std::mismatch(cpu.begin(), cpu.end(), gpu.begin(), gpu.end());
    if (pair.first == cpu.end() && pair.second == gpu.end()) return;
    std::printf("DIFFERENT %s: first at %td of %zu\n", what.c_str(), pair.first - cpu.begin(),
                cpu.size());
    ok_ = false;
  }
  bool ok() const { return ok_; }

 private:
  bool ok_ = true;
};

/// One manager and what it writes, in host vectors.
class Subject {
 public:
  Subject(Inputs& inputs, std::int64_t batch, Device device, cudaStream_t stream)
      : inputs_(inputs),
        batch_(batch),
        device_(device),
        stream_(stream),
        manager_(graph_config(1, inputs.length + 8, device), walking()) {
    inputs.load(manager_, 0, batch, device);
    manager_.walk(0, {}, Stream{stream});
  }

  GraphManager& manager() { return manager_; }

  template <class T>
  std::vector<T> written(DType dtype, std::initializer_list<std::int64_t> shape,
                         const std::function<void(const TensorView&, Stream)>& write) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    std::vector<T> host(static_cast<std::size_t>(count));
    if (device_ == kCpu) {
      write(view_of(host.data(), dtype, shape, device_), {});
      return host;
    }
    const Buffer buffer = to_device(host);
    write(view_of(buffer.as<void>(), dtype, shape, device_), Stream{stream_});
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return to_host<T>(buffer);
  }

  std::vector<std::uint32_t> visits(int population) {
    return written<std::uint32_t>(
        DType::u32, {batch_, kHeads, manager_.length(0)},
        [&](const auto& out, Stream stream) { manager_.visits(0, population, out, stream); });
  }
  std::vector<float> scores() {
    return written<float>(
        DType::f32, {batch_, kHeads, manager_.length(0)},
        [&](const auto& out, Stream stream) { manager_.scores(0, -1, out, stream); });
  }
  std::vector<std::int32_t> positions() {
    return written<std::int32_t>(
        DType::i32, {batch_, kHeads, manager_.length(0)},
        [&](const auto& out, Stream stream) { manager_.positions(0, out, stream); });
  }
  std::vector<std::int32_t> neighbors() {
    return written<std::int32_t>(
        DType::i32, {batch_, kHeads, manager_.length(0), kTopK},
        [&](const auto& out, Stream stream) {
          std::vector<float> host;
          const std::int64_t count = batch_ * kHeads * manager_.length(0) * kTopK;
          if (device_ == kCpu) host.resize(static_cast<std::size_t>(count));
          const Buffer buffer(count * 4);
          manager_.rows(
              0, out,
              view_of(device_ == kCpu ? static_cast<void*>(host.data()) : buffer.as<void>(),
                      DType::f32, {batch_, kHeads, manager_.length(0), kTopK}, device_),
              stream);
        });
  }
  std::vector<std::int32_t> select(const EvictionConfig& eviction) {
    return written<std::int32_t>(
        DType::i32, {batch_, kHeads, manager_.kept_length(0, eviction, true)},
        [&](const auto& out, Stream stream) { manager_.select(0, eviction, true, out, stream); });
  }
  std::vector<std::uint8_t> safety_mask(const EvictionConfig& eviction) {
    return written<std::uint8_t>(DType::u8, {batch_, kHeads, manager_.length(0)},
                                 [&](const auto& out, Stream stream) {
                                   manager_.safety_mask(0, eviction, 0.2, out, stream);
                                 });
  }
  std::vector<std::int32_t> next_slots() {
    return written<std::int32_t>(DType::i32, {batch_, kHeads}, [&](const auto& out, Stream stream) {
      manager_.next_slots(0, out, stream);
    });
  }
  /// Compacts `cache` (keys, then values) and the graph.
  void compact(std::vector<std::int32_t> keep, std::vector<std::uint16_t>& cache) {
    const auto width = static_cast<std::int64_t>(keep.size()) / (batch_ * kHeads);
    const auto apply = [&](void* list, std::uint16_t* data) {
      const std::initializer_list<std::int64_t> shape{batch_, kHeads, inputs_.length, kDim};
      const std::int64_t half = batch_ * kHeads * inputs_.length * kDim;
      manager_.compact(0, view_of(list, DType::i32, {batch_, kHeads, width}, device_),
                       view_of(data, DType::bf16, shape, device_),
                       view_of(data + half, DType::bf16, shape, device_), Stream{stream_});
    };
    if (device_ == kCpu) {
      apply(keep.data(), cache.data());
      return;
    }
    const Buffer list = to_device(keep);
    const Buffer data = to_device(cache);
    apply(list.as<void>(), data.as<std::uint16_t>());
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    cache = to_host<std::uint16_t>(data);
  }

 private:
  Inputs& inputs_;
  std::int64_t batch_;
  Device device_;
  cudaStream_t stream_;
  GraphManager manager_;
};

/// Both backends on the same graph: everything that this program times.
bool check_against_cpu(std::int64_t length, std::int64_t batch, cudaStream_t stream) {
  Inputs inputs(length);
  const std::string where = " (S " + std::to_string(length) + ", B " + std::to_string(batch) + ")";
  Comparison compare;
  for (const bool runs : {false, true}) {
    Subject cpu(inputs, batch, kCpu, nullptr);
    Subject gpu(inputs, batch, kGpu, stream);
    for (const int population : {0, 1}) {
      compare.equal("visits of population " + std::to_string(population) + where,
                    cpu.visits(population), gpu.visits(population));
    }
    compare.equal("scores" + where, cpu.scores(), gpu.scores());
    const EvictionConfig eviction{.budget = length / 5, .interval = 1};
    compare.equal("select" + where, cpu.select(eviction), gpu.select(eviction));
    compare.equal("safety_mask" + where, cpu.safety_mask(eviction), gpu.safety_mask(eviction));
    compare.equal("next_slots" + where, cpu.next_slots(), gpu.next_slots());

    std::vector<std::int64_t> counts;
    for (std::int64_t b = 0; b < batch; ++b) counts.push_back(length / 5 - 17 * b);
    const std::vector<std::int32_t> keep = keep_table(length, counts, runs);
    std::mt19937 random(5);
    std::vector<std::uint16_t> cache(static_cast<std::size_t>(2 * batch * kHeads * length * kDim));
    for (std::uint16_t& value : cache) value = static_cast<std::uint16_t>(random());
    std::vector<std::uint16_t> moved = cache;
    cpu.compact(keep, cache);
    gpu.compact(keep, moved);
    // What lies behind the kept slots has no meaning.
    const std::int64_t kept = gpu.manager().length(0);
    const auto only_kept = [&](const std::vector<std::uint16_t>& all) {
      std::vector<std::uint16_t> front;
      for (std::int64_t row = 0; row < 2 * batch * kHeads; ++row) {
        const std::int64_t b = row / kHeads % batch;
        const auto begin = all.begin() + row * length * kDim;
        front.insert(front.end(), begin + (kept - counts[static_cast<std::size_t>(b)]) * kDim,
                     begin + kept * kDim);
      }
      return front;
    };
    const std::string kind = (runs ? " in runs" : " at random") + where;
    compare.equal("compacted keys and values" + kind, only_kept(cache), only_kept(moved));
    compare.equal("compacted positions" + kind, cpu.positions(), gpu.positions());
    compare.equal("compacted rows" + kind, cpu.neighbors(), gpu.neighbors());
    compare.equal("compacted scores" + kind, cpu.scores(), gpu.scores());
    compare.equal("compacted visits" + kind, cpu.visits(1), gpu.visits(1));
  }
  return compare.ok();
}

// ---- times

constexpr std::int64_t kLength = 65536;
constexpr std::int64_t kKept = kLength / 5;

struct Cache {
  Buffer keys;
  Buffer values;

  Cache(std::int64_t batch, cudaStream_t stream)
      : keys(batch * kHeads * kLength * kDim * kElement),
        values(batch * kHeads * kLength * kDim * kElement) {
    fill(keys, 1, stream);
    fill(values, 2, stream);
  }
  TensorView view(const Buffer& buffer, std::int64_t batch) const {
    return view_of(buffer.as<void>(), DType::bf16, {batch, kHeads, kLength, kDim}, kGpu);
  }
};

std::string case_of(std::int64_t batch, const std::string& kind) {
  return "B=" + std::to_string(batch) + " S=65536 to 20 % Hkv=8 D=128 bf16" +
         (kind.empty() ? "" : " " + kind);
}

void time_compaction(std::int64_t batch, bool runs, double bandwidth, int repeats,
                     TimingStream& timer, Inputs& inputs) {
  const Cache cache(batch, timer.get());
  const std::vector<std::int64_t> counts(static_cast<std::size_t>(batch), kKept);
  const Buffer keep = to_device(keep_table(kLength, counts, runs));
  // As many bytes from one place to another, by the same rules: a short copy does not reach the
  // rate of a long one.
  const std::int64_t kept_bytes = 2 * batch * kHeads * kKept * kDim * kElement;
  const Buffer from(kept_bytes);
  const Buffer to(kept_bytes);
  const Timing copy = measure_cold(timer, repeats, [&] {
    constexpr int kThreads = 256;
    constexpr int kLoads = 4;
    const std::int64_t vectors = kept_bytes / static_cast<std::int64_t>(sizeof(uint4));
    const std::int64_t blocks = (vectors + kThreads * kLoads - 1) / (kThreads * kLoads);
    copy_kernel<kLoads><<<static_cast<unsigned>(blocks), kThreads, 0, timer.get()>>>(
        from.as<const uint4>(), to.as<uint4>(), vectors);
    check(cudaGetLastError(), "copy_kernel");
  });
  const auto report = [&](const char* bench, std::int64_t slot_bytes, const Timing& timing) {
    // Read and written.
    const double bytes = 2.0 * static_cast<double>(batch * kHeads * kKept * slot_bytes);
    const double rate = bytes / (timing.median * 1e-6);
    print(bench, case_of(batch, runs ? "runs of 64" : "random"), timing,
          {{"bytes", bytes},
           {"floor_us", 1e6 * bytes / bandwidth},
           {"gbs", 1e-9 * rate},
           {"copy_gbs", 1e-9 * bandwidth},
           {"fraction_of_copy", rate / bandwidth},
           {"copy_of_kept_keys_and_values_us", copy.median}});
  };

  const Buffer fault(sizeof(cuda::FaultRecord));
  check(cudaMemset(fault.as<void>(), 0, sizeof(cuda::FaultRecord)), "cudaMemset");
  std::vector<cuda::MoveJob> jobs;
  for (const Buffer* buffer : {&cache.keys, &cache.values}) {
    constexpr std::int64_t kWidth = kDim * kElement;
    jobs.push_back({.data = buffer->as<void>(),
                    .sequence_stride = kHeads * kLength * kWidth,
                    .row_stride = kLength * kWidth,
                    .slot_stride = kWidth,
                    .width = kWidth,
                    .rows = kHeads});
  }
  const cuda::TableView<const std::int32_t> table{.data = keep.as<const std::int32_t>(),
                                                  .sequence_stride = kHeads * kKept,
                                                  .head_stride = kKept,
                                                  .slot_stride = 1};
  constexpr std::int64_t kCacheBytes = 2 * kDim * kElement;
  report("move", kCacheBytes, measure_cold(timer, repeats, [&] {
           cuda::launch_move(jobs.data(), static_cast<int>(jobs.size()), batch, table, kKept,
                             fault.as<const cuda::FaultRecord>(), timer.get());
         }));

  // A compacted graph cannot be compacted again: every call takes a fresh layer.
  const std::int64_t layers = batch == 1 ? 8 : 4;
  GraphManager manager(graph_config(layers, kLength, kGpu), WalkConfig{});
  std::vector<double> times;
  for (int round = 0; round < 2; ++round) {
    for (std::int64_t layer = 0; layer < layers; ++layer) inputs.load(manager, layer, batch, kGpu);
    manager.synchronize();
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      const double time = timer.time_cold([&] {
        manager.compact(layer, view_of(keep.as<void>(), DType::i32, {batch, kHeads, kKept}, kGpu),
                        cache.view(cache.keys, batch), cache.view(cache.values, batch),
                        timer.opaque(), counts);
      });
      if (round > 0 || layer > 0) times.push_back(time);
    }
  }
  const std::int64_t graph_bytes =
      manager.memory_use().graph_bytes / (layers * batch * kHeads * kLength);
  report("compact", kCacheBytes + graph_bytes, summarize(std::move(times)));
}

void time_choice(std::int64_t batch, int repeats, TimingStream& timer, Inputs& inputs) {
  // Enough walkers that most slots have visits of their own; then what a step has.
  for (const std::int64_t walkers : {std::int64_t{1024}, std::int64_t{65536}}) {
    WalkConfig walk;
    walk.num_walkers = walkers;
    GraphManager manager(graph_config(1, kLength + 64, kGpu), walk);
    inputs.load(manager, 0, batch, kGpu);
    manager.walk(0, {}, timer.opaque());
    manager.synchronize();
    const EvictionConfig eviction{.budget = kKept, .interval = 1};
    const Buffer kept(batch * kHeads * kKept * 4);
    const Buffer words(batch * kHeads * kLength * 4);
    const Buffer slots(batch * kHeads * 4);
    const std::string kind = std::to_string(walkers) + " walkers";
    const auto time = [&](const char* bench, double bytes,
                          const std::function<void(Stream)>& call) {
      const Timing cold = measure_cold(timer, repeats, [&] { call(timer.opaque()); });
      manager.synchronize();
      const Timing warm = measure({.calls = 4, .replays = repeats},
                                  [&](int, cudaStream_t stream) { call({stream}); });
      print(bench, case_of(batch, kind), cold,
            {{"bytes", bytes}, {"graph_replay_warm_us", warm.median}});
    };
    const double score_bytes = static_cast<double>(batch * kHeads * kLength * 2 * 4);
    time("select", score_bytes, [&](Stream stream) {
      manager.select(0, eviction, true,
                     view_of(kept.as<void>(), DType::i32, {batch, kHeads, kKept}, kGpu), stream);
    });
    time("safety_mask", score_bytes, [&](Stream stream) {
      manager.safety_mask(0, eviction, 0.2,
                          view_of(words.as<void>(), DType::u8, {batch, kHeads, kLength}, kGpu),
                          stream);
    });
    time("scores", 1.5 * score_bytes, [&](Stream stream) {
      manager.scores(0, -1, view_of(words.as<void>(), DType::f32, {batch, kHeads, kLength}, kGpu),
                     stream);
    });
    time("next_slots", 0.25 * score_bytes, [&](Stream stream) {
      manager.next_slots(0, view_of(slots.as<void>(), DType::i32, {batch, kHeads}, kGpu), stream);
    });
  }
}

/// Frees four fifths of the slots and puts tokens into freed ones. No byte of the cache changes but
/// those of the new tokens, which the caller writes.
bool time_reuse(std::int64_t batch, int repeats, TimingStream& timer, Inputs& inputs) {
  const Cache cache(batch, timer.get());
  const std::int64_t bytes = cache.keys.bytes();
  const Buffer before(bytes);
  check(cudaMemcpyAsync(before.as<void>(), cache.keys.as<void>(), static_cast<std::size_t>(bytes),
                        cudaMemcpyDeviceToDevice, timer.get()),
        "cudaMemcpyAsync");
  const std::vector<std::int64_t> counts(static_cast<std::size_t>(batch), kKept);
  const Buffer keep = to_device(keep_table(kLength, counts, false));
  const Buffer slots(batch * kHeads * 4);
  const Buffer query(batch * kQueryHeads * kDim * kElement);
  fill(query, 3, timer.get());
  const Buffer differing(8);
  check(cudaMemsetAsync(differing.as<void>(), 0, 8, timer.get()), "cudaMemsetAsync");

  GraphManager manager(graph_config(1, kLength, kGpu), WalkConfig{});
  inputs.load(manager, 0, batch, kGpu);
  manager.synchronize();
  const double release = timer.time_cold([&] {
    manager.release(0, view_of(keep.as<void>(), DType::i32, {batch, kHeads, kKept}, kGpu),
                    timer.opaque(), counts);
  });
  print("release", case_of(batch, ""), {.median = release, .low = release, .high = release});
  const Timing reuse = measure_cold(timer, repeats, [&] {
    const TensorView free = view_of(slots.as<void>(), DType::i32, {batch, kHeads}, kGpu);
    manager.next_slots(0, free, timer.opaque());
    manager.update(0, view_of(query.as<void>(), DType::bf16, {batch, kQueryHeads, kDim}, kGpu),
                   cache.view(cache.keys, batch), free, {}, timer.opaque());
  });
  differing_kernel<<<1024, 256, 0, timer.get()>>>(cache.keys.as<const uint4>(),
                                                  before.as<const uint4>(), bytes / 16,
                                                  differing.as<unsigned long long>());
  check(cudaGetLastError(), "differing_kernel");
  check(cudaStreamSynchronize(timer.get()), "cudaStreamSynchronize");
  manager.synchronize();
  const auto moved = to_host<unsigned long long>(differing)[0];
  print("reuse", case_of(batch, "next_slots and update into freed slots"), reuse,
        {{"old_bytes_moved", static_cast<double>(moved)},
         {"tokens_held", static_cast<double>(manager.tokens_held(0, 0))}});
  const bool ok = moved == 0 && manager.tokens_held(0, 0) == kKept + repeats + 2 &&
                  manager.length(0) == kLength;
  if (!ok) std::printf("DIFFERENT slot reuse: bytes moved, or tokens not in freed slots\n");
  return ok;
}

int run(int repeats) {
  TimingStream timer;
  bool ok = check_against_cpu(4099, 3, timer.get());
  ok = check_against_cpu(kLength, 1, timer.get()) && ok;
  std::printf("{\"bench\": \"check_move\", \"case\": \"against the CPU backend\", \"ok\": %s}\n",
              ok ? "true" : "false");
  std::fflush(stdout);
  const double bandwidth = copy_bandwidth();
  Inputs inputs(kLength);
  for (const std::int64_t batch : {1, 8}) {
    for (const bool runs : {false, true}) {
      time_compaction(batch, runs, bandwidth, repeats, timer, inputs);
    }
    time_choice(batch, repeats, timer, inputs);
    ok = time_reuse(batch, repeats, timer, inputs) && ok;
  }
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace spectralkv::bench

int main(int argc, char** argv) {
  try {
    return spectralkv::bench::run(argc > 1 ? std::stoi(argv[1]) : 30);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
