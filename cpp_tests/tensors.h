// Tensors for tests: owned memory behind a view, with any strides and with poison between the
// elements.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numbers>
#include <numeric>
#include <utility>
#include <vector>

#include "spectralkv/tensor.h"

namespace spectralkv::test {

using Index = std::int64_t;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Unsigned view of an index, for the standard containers.
constexpr std::size_t at(Index index) { return static_cast<std::size_t>(index); }

/// Number of elements, signed.
template <class Container>
Index count_of(const Container& container) {
  return static_cast<Index>(container.size());
}

/// SplitMix64: the same numbers with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15U;
    std::uint64_t mixed = state_;
    mixed = (mixed ^ (mixed >> 30U)) * 0xbf58476d1ce4e5b9U;
    mixed = (mixed ^ (mixed >> 27U)) * 0x94d049bb133111ebU;
    return mixed ^ (mixed >> 31U);
  }
  /// In [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11U) * 0x1p-53; }
  /// In [low, high].
  Index integer(Index low, Index high) {
    return low + static_cast<Index>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }
  bool chance(double probability) { return uniform() < probability; }
  template <class T>
  void shuffle(std::vector<T>& values) {
    for (Index i = count_of(values) - 1; i > 0; --i) {
      std::swap(values[at(i)], values[at(integer(0, i))]);
    }
  }

 private:
  std::uint64_t state_;
};

/// A half, exactly.
inline double half_to_double(std::uint16_t bits) {
  const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 10U) & 0x1f;
  const int fraction = bits & 0x3ff;
  if (exponent == 0x1f) return fraction != 0 ? kNan : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

/// Nearest, ties to even.
inline std::uint16_t double_to_half(double value) {
  const std::uint32_t sign = std::signbit(value) ? 0x8000U : 0U;
  if (std::isnan(value)) return 0x7e00U;
  const double magnitude = std::abs(value);
  if (magnitude >= 65520.0) return static_cast<std::uint16_t>(sign | 0x7c00U);
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  // The hidden bit carries into the exponent when rounding overflows the fraction.
  const double steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  const auto biased = static_cast<std::uint32_t>(exponent + 14);
  return static_cast<std::uint16_t>(sign | ((biased << 10U) + static_cast<std::uint32_t>(steps)));
}

inline double bfloat_to_double(std::uint16_t bits) {
  return static_cast<double>(std::bit_cast<float>(std::uint32_t{bits} << 16U));
}

/// Nearest, ties to even (of the fp32 value).
inline std::uint16_t double_to_bfloat(double value) {
  const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
  if (std::isnan(value)) return 0x7fc0U;
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U);
}

/// Memory of one HostTensor.
struct HostRange {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

/// The memory of all HostTensors, so that a view into one tells how far it may reach.
class HostRanges {
 public:
  static void add(std::byte* data, std::size_t bytes) {
    const std::lock_guard lock(mutex());
    ranges()[data] = bytes;
  }
  static void remove(std::byte* data) {
    const std::lock_guard lock(mutex());
    ranges().erase(data);
  }
  /// The one that holds an address; without data where there is none.
  static HostRange find(const std::byte* address) {
    const std::lock_guard lock(mutex());
    auto after = ranges().upper_bound(const_cast<std::byte*>(address));
    if (after == ranges().begin()) return {};
    const auto [data, bytes] = *std::prev(after);
    if (address >= data + bytes) return {};
    return {.data = data, .bytes = bytes};
  }

 private:
  static std::map<std::byte*, std::size_t>& ranges() {
    static std::map<std::byte*, std::size_t> all;
    return all;
  }
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
};

/// Allocates and keeps HostRanges up to date.
template <class T>
struct TrackingAllocator {
  using value_type = T;

  TrackingAllocator() = default;
  template <class Other>
  TrackingAllocator(const TrackingAllocator<Other>&) {}  // NOLINT(*-explicit-*)

  T* allocate(std::size_t count) {
    T* data = std::allocator<T>().allocate(count);
    HostRanges::add(reinterpret_cast<std::byte*>(data), count * sizeof(T));
    return data;
  }
  void deallocate(T* data, std::size_t count) {
    HostRanges::remove(reinterpret_cast<std::byte*>(data));
    std::allocator<T>().deallocate(data, count);
  }
  friend bool operator==(const TrackingAllocator&, const TrackingAllocator&) { return true; }
};

using Bytes = std::vector<std::byte, TrackingAllocator<std::byte>>;

/// Memory with a view of it. What lies between the elements is 0xff everywhere: NaN in every
/// floating type, and easy to recognise when something was written there.
class HostTensor {
 public:
  HostTensor() = default;

  /// Row-major, zero.
  HostTensor(DType dtype, const std::vector<Index>& shape) : HostTensor(dtype, shape, {}, 0) {}

  /// `order` lists the axes from the outermost in memory to the innermost, which must be the last
  /// one; empty: 0, 1, ... `gap` elements follow every run of every axis.
  HostTensor(DType dtype, const std::vector<Index>& shape, std::vector<int> order, Index gap) {
    if (order.empty()) {
      order.resize(shape.size());
      std::iota(order.begin(), order.end(), 0);
    }
    view_.dtype = dtype;
    view_.rank = static_cast<int>(shape.size());
    Index extent = 1;
    for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
      const auto index = static_cast<std::size_t>(*axis);
      view_.shape[index] = shape[index];
      view_.strides[index] = extent;
      extent = extent * shape[index] + gap;
    }
    elements_ = 1;
    for (const Index size : shape) elements_ *= size;
    // One element more, so that an empty tensor has an address, too.
    bytes_.assign(at((extent + 1) * size_of(dtype)), std::byte{0xff});
    for_each_address(
        [this](std::byte* address) { std::memset(address, 0, at(size_of(view_.dtype))); });
  }

  ConstTensorView view() const {
    ConstTensorView result = view_;
    result.data = bytes_.data();
    return result;
  }
  TensorView view() {
    TensorView result = view_;
    result.data = bytes_.data();
    return result;
  }

  DType dtype() const { return view_.dtype; }
  Index size(int axis) const { return view_.size(axis); }
  Index elements() const { return elements_; }
  const Bytes& bytes() const { return bytes_; }

  template <class Indices = std::initializer_list<Index>>
  double get(const Indices& index) const {
    return decode(bytes_.data() + offset(index));
  }
  double get(std::initializer_list<Index> index) const {
    return decode(bytes_.data() + offset(index));
  }
  Index get_index(std::initializer_list<Index> index) const {
    return static_cast<Index>(get(index));
  }

  template <class Indices>
  void set(const Indices& index, double value) {
    encode(bytes_.data() + offset(index), value);
  }
  void set(std::initializer_list<Index> index, double value) {
    encode(bytes_.data() + offset(index), value);
  }

  /// Calls `visit(index)` for every element, the last axis fastest.
  template <class Visit>
  void for_each(Visit&& visit) const {
    if (elements_ == 0) return;
    std::vector<Index> index(at(view_.rank), 0);
    while (true) {
      visit(std::as_const(index));
      int axis = view_.rank - 1;
      while (axis >= 0 && ++index[at(axis)] == view_.size(axis)) index[at(axis--)] = 0;
      if (axis < 0) return;
    }
  }
  void fill(double value) {
    for_each_address([&](std::byte* address) { encode(address, value); });
  }
  void fill_normal(Random& random, double scale = 1.0) {
    for_each_address([&](std::byte* address) { encode(address, scale * random.normal()); });
  }
  /// Any bit pattern, the elements only.
  void fill_bits(Random& random) {
    for_each_address([&](std::byte* address) {
      const std::uint64_t bits = random.bits();
      std::memcpy(address, &bits, at(size_of(view_.dtype)));
    });
  }
  /// Bits of one element.
  std::uint32_t bits(std::initializer_list<Index> index) const {
    std::uint32_t result = 0;
    std::memcpy(&result, bytes_.data() + offset(index), at(size_of(view_.dtype)));
    return result;
  }
  /// Whether the memory between the elements is still as it was made.
  bool gaps_untouched() const {
    std::vector<std::uint8_t> is_element(bytes_.size(), 0);
    for_each([&](const std::vector<Index>& index) {
      for (Index i = 0; i < size_of(view_.dtype); ++i) is_element[offset(index) + at(i)] = 1;
    });
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      if (is_element[i] == 0 && bytes_[i] != std::byte{0xff}) return false;
    }
    return true;
  }

  /// The last axis at a place of the others.
  std::vector<double> vector(std::initializer_list<Index> place) const {
    const Index last = size(view_.rank - 1);
    const std::byte* address = bytes_.data() + offset(place);
    std::vector<double> values;
    values.reserve(at(last));
    for (Index i = 0; i < last; ++i) values.push_back(decode(address + i * size_of(view_.dtype)));
    return values;
  }

 private:
  template <class T>
  static T load(const std::byte* address) {
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
  }
  template <class T>
  static void store(std::byte* address, T value) {
    std::memcpy(address, &value, sizeof(T));
  }
  double decode(const std::byte* address) const {
    switch (view_.dtype) {
      case DType::f32:
        return static_cast<double>(load<float>(address));
      case DType::f16:
        return half_to_double(load<std::uint16_t>(address));
      case DType::bf16:
        return bfloat_to_double(load<std::uint16_t>(address));
      case DType::i32:
        return static_cast<double>(load<std::int32_t>(address));
      case DType::u32:
        return static_cast<double>(load<std::uint32_t>(address));
      case DType::u8:
        return static_cast<double>(load<std::uint8_t>(address));
    }
    return kNan;
  }
  void encode(std::byte* address, double value) const {
    switch (view_.dtype) {
      case DType::f32:
        return store(address, static_cast<float>(value));
      case DType::f16:
        return store(address, double_to_half(value));
      case DType::bf16:
        return store(address, double_to_bfloat(value));
      case DType::i32:
        return store(address, static_cast<std::int32_t>(value));
      case DType::u32:
        return store(address, static_cast<std::uint32_t>(value));
      case DType::u8:
        return store(address, static_cast<std::uint8_t>(value));
    }
  }
  /// for_each, the last axis without any index arithmetic: tests run without optimisation, too.
  template <class Visit>
  void for_each_address(Visit&& visit) {
    if (elements_ == 0) return;
    const Index last = size(view_.rank - 1);
    const Index width = size_of(view_.dtype);
    std::vector<Index> index(at(view_.rank), 0);
    while (true) {
      std::byte* address = bytes_.data() + offset(index);
      for (Index i = 0; i < last; ++i) visit(address + i * width);
      int axis = view_.rank - 2;
      while (axis >= 0 && ++index[at(axis)] == view_.size(axis)) index[at(axis--)] = 0;
      if (axis < 0) return;
    }
  }
  template <class Indices>
  std::size_t offset(const Indices& index) const {
    Index place = 0;
    std::size_t axis = 0;
    for (const Index i : index) place += i * view_.strides[axis++];
    return at(place * size_of(view_.dtype));
  }

  TensorView view_;
  Index elements_ = 0;
  Bytes bytes_;
};

}  // namespace spectralkv::test
