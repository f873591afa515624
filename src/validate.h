// Checks of callers' arguments. Messages read: [operation] <what> must be <expected>, got <came>.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "spectralkv/attention.h"
#include "spectralkv/error.h"
#include "spectralkv/tensor.h"

namespace spectralkv::detail {

[[noreturn]] void throw_invalid(std::string_view operation, std::string_view what,
                                std::string_view expected, std::string_view got);

/// "(2, 8, 64)"
std::string shape_string(std::initializer_list<std::int64_t> extents);
template <class Pointer>
std::string shape_string(const BasicTensorView<Pointer>& view) {
  std::string text = "(";
  for (int axis = 0; axis < view.rank; ++axis) {
    if (axis != 0) text += ", ";
    text += std::to_string(view.size(axis));
  }
  return text + (view.rank == 1 ? ",)" : ")");
}

/// An extent that a tensor check leaves open.
inline constexpr std::int64_t kAny = -1;

/// What a tensor argument has to be.
struct TensorSpec {
  std::string_view operation;
  std::string_view name;
  std::string_view axes;  ///< e.g. "(B, Hkv, S, D)"
  std::initializer_list<std::int64_t> extents;
  std::initializer_list<DType> dtypes;
  Device device;
  bool unit_last_stride = true;
  bool writable = false;  ///< distinct elements must not share memory along a broadcast axis
};

void check_tensor(const ConstTensorView& view, const TensorSpec& spec);

/// Of (B, Hkv, S, ...): S is no less.
void check_slots(std::string_view operation, std::string_view name, const ConstTensorView& view,
                 std::int64_t least);
/// That of the queries.
void check_same_dtype(std::string_view operation, std::string_view name,
                      const ConstTensorView& view, const ConstTensorView& queries);

void check_score_options(std::string_view operation, const ScoreOptions& options);
/// The factor that options mean.
double scale_of(const ScoreOptions& options, std::int64_t head_dim);

/// The values (B, Hkv, S, D) of an attention over `slots` slots and its output (B, Hq, D), where
/// queries (B, Hq, ...) and keys (B, Hkv, S, D) were checked.
void check_attended(std::string_view operation, const ConstTensorView& queries,
                    const ConstTensorView& keys, const ConstTensorView& values, std::int64_t slots,
                    const TensorView& out);

void check_range(std::string_view operation, std::string_view what, std::int64_t value,
                 std::int64_t low, std::int64_t high);

}  // namespace spectralkv::detail
