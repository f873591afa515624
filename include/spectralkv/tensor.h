// Views of memory that somebody else owns.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "spectralkv/error.h"
#include "spectralkv/export.h"

namespace spectralkv {

enum class DType : std::uint8_t { f32, f16, bf16, i32, u32, u8 };

/// Bytes of one element.
constexpr std::int64_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
    case DType::u32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::u8:
      return 1;
  }
  return 0;
}

/// "float32", "bfloat16", ...
SPECTRALKV_API const char* name_of(DType dtype) noexcept;

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  friend constexpr bool operator==(const Device&, const Device&) = default;
};

/// "cpu", "cuda:0", ...
SPECTRALKV_API std::string name_of(Device device);

/// Most axes a view can have.
inline constexpr int kMaxRank = 5;

/// A strided view. `Pointer` is `void` for memory that may be written and `const void` for memory
/// that is only read. Strides count elements, as in DLPack. Only the first `rank` entries of
/// `shape` and `strides` mean anything. The view owns nothing.
template <class Pointer>
struct BasicTensorView {
  static_assert(std::is_void_v<Pointer>);

  Pointer* data = nullptr;
  DType dtype = DType::f32;
  Device device{};
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  constexpr BasicTensorView() = default;

  /// A contiguous (row-major) view.
  BasicTensorView(Pointer* pointer, DType type, std::initializer_list<std::int64_t> extents,
                  Device where = {})
      : data(pointer), dtype(type), device(where) {
    if (extents.size() > kMaxRank) throw InvalidArgument("[TensorView] expected at most 5 axes");
    for (const std::int64_t extent : extents) {
      shape[static_cast<std::size_t>(rank++)] = extent;
    }
    std::int64_t stride = 1;
    for (int axis = rank - 1; axis >= 0; --axis) {
      strides[static_cast<std::size_t>(axis)] = stride;
      stride *= shape[static_cast<std::size_t>(axis)];
    }
  }

  /// A view that may be written is also one that may be read.
  template <class Other>
    requires(std::is_const_v<Pointer> && !std::is_const_v<Other>)
  constexpr BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(*-explicit-*)
      : data(other.data),
        dtype(other.dtype),
        device(other.device),
        rank(other.rank),
        shape(other.shape),
        strides(other.strides) {}

  constexpr std::int64_t size(int axis) const { return shape[static_cast<std::size_t>(axis)]; }
  constexpr std::int64_t stride(int axis) const { return strides[static_cast<std::size_t>(axis)]; }
  constexpr bool empty() const { return data == nullptr && rank == 0; }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

}  // namespace spectralkv
