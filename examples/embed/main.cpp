// A decoder that writes in a cache of a fixed size: plain C++, no framework, buffers of its own.
//
//   embed [--device cpu|cuda] [--tokens N] [--budget N] [--interval N]
//
// Prints the last tokens it wrote, what was held and what was let go. --budget 0 keeps everything.
#include <cstdint>
#include <deque>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "decoder.h"
#include "kv_cache.h"
#include "spectralkv/spectralkv.h"

namespace {

namespace skv = spectralkv;

constexpr std::string_view kUsage =
    "usage: embed [--device cpu|cuda] [--tokens N] [--budget N] [--interval N]\n"
    "A decoder of random weights that writes N tokens in a cache of a fixed size; --budget 0 keeps "
    "everything.\n";

struct Options {
  skv::Device device{};
  std::int64_t tokens = 500;
  skv::EvictionConfig eviction{.budget = 96, .interval = 32};
};

std::int64_t parse_count(std::string_view name, const std::string& text, std::int64_t least) {
  std::size_t end = 0;
  std::int64_t count = 0;
  try {
    count = std::stoll(text, &end);
  } catch (const std::logic_error&) {
    end = 0;
  }
  if (end == 0 || end != text.size() || count < least) {
    throw std::invalid_argument("[embed] " + std::string(name) +
                                " must be an integer of at least " + std::to_string(least) +
                                ", got " + text);
  }
  return count;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string_view name = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "nothing";
    if (name == "--device" && (value == "cpu" || value == "cuda")) {
      options.device.type = value == "cpu" ? skv::DeviceType::cpu : skv::DeviceType::cuda;
    } else if (name == "--device") {
      throw std::invalid_argument("[embed] --device must be cpu or cuda, got " + value);
    } else if (name == "--tokens") {
      options.tokens = parse_count(name, value, 1);
    } else if (name == "--budget") {
      options.eviction.budget = parse_count(name, value, 0);
    } else if (name == "--interval") {
      options.eviction.interval = parse_count(name, value, 1);
    } else {
      throw std::invalid_argument(
          "[embed] options must be --device, --tokens, --budget or --interval, got " +
          std::string(name));
    }
  }
  return options;
}

void write(const Options& options) {
  const Shape shape;
  const Decoder decoder(shape, 7);
  KvCache cache(shape, options.eviction, options.tokens, options.device);
  std::deque<std::int64_t> last;
  std::int64_t token = 1;
  for (std::int64_t position = 0; position < options.tokens; ++position) {
    token = decoder.step(token, position, cache);
    last.push_back(token);
    if (last.size() > 12) last.pop_front();
  }
  std::cout << "last tokens:";
  for (const std::int64_t written : last) std::cout << ' ' << written;
  const skv::Statistics statistics = cache.statistics();
  std::cout << '\n'
            << options.tokens << " tokens seen, " << cache.length(0) << " held by each head in "
            << cache.bytes() / 1024 << " KiB, " << statistics.evicted << " let go, "
            << statistics.walks << " graphs walked\n";
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string_view> arguments(argv + 1, argv + argc);
  for (const std::string_view argument : arguments) {
    if (argument != "--help" && argument != "-h") continue;
    std::cout << kUsage;
    return 0;
  }
  std::cout << "spectralkv " << skv::version() << ", CPU kernels: " << skv::cpu_simd()
            << ", CUDA devices: ";
  if (const int devices = skv::cuda_device_count(); devices > 0) {
    std::cout << devices << '\n';
  } else {
    std::cout << "none (" << skv::cuda_status() << ")\n";
  }
  try {
    write(parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
