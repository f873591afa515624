#include "validate.h"

#include <cmath>
#include <string>
#include <utility>

namespace spectralkv::detail {
namespace {

std::string dtype_list(std::initializer_list<DType> dtypes) {
  std::string text;
  std::size_t count = 0;
  for (const DType dtype : dtypes) {
    if (count != 0) text += count + 1 == dtypes.size() ? " or " : ", ";
    text += name_of(dtype);
    ++count;
  }
  return text;
}

/// "(B, Hkv, S, D) = (1, 2, any, 64)"
std::string expected_shape(const TensorSpec& spec) {
  std::string text{spec.axes};
  text += " = (";
  bool first = true;
  for (const std::int64_t extent : spec.extents) {
    if (!first) text += ", ";
    first = false;
    text += extent == kAny ? std::string("any") : std::to_string(extent);
  }
  return text + ")";
}

}  // namespace

void throw_invalid(std::string_view operation, std::string_view what, std::string_view expected,
                   std::string_view got) {
  std::string message = "[";
  message.append(operation).append("] ").append(what).append(" must be ").append(expected);
  message.append(", got ").append(got);
  throw InvalidArgument(message);
}

std::string shape_string(std::initializer_list<std::int64_t> extents) {
  std::string text = "(";
  bool first = true;
  for (const std::int64_t extent : extents) {
    if (!first) text += ", ";
    first = false;
    text += std::to_string(extent);
  }
  return text + ")";
}

void check_tensor(const ConstTensorView& view, const TensorSpec& spec) {
  const auto invalid = [&](std::string_view aspect, const std::string& expected,
                           const std::string& got) {
    std::string what(spec.name);
    if (!aspect.empty()) what.append(spec.name.ends_with('s') ? "' " : "'s ").append(aspect);
    throw_invalid(spec.operation, what, expected, got);
  };
  bool shape_ok = std::cmp_equal(view.rank, spec.extents.size());
  std::int64_t elements = 1;
  int axis = 0;
  for (const std::int64_t extent : spec.extents) {
    if (!shape_ok) break;
    const std::int64_t size = view.size(axis++);
    shape_ok = extent == kAny ? size >= 0 : size == extent;
    elements *= size;
  }
  if (!shape_ok) invalid("", expected_shape(spec), shape_string(view));
  bool dtype_ok = false;
  for (const DType dtype : spec.dtypes) dtype_ok = dtype_ok || dtype == view.dtype;
  if (!dtype_ok) invalid("dtype", dtype_list(spec.dtypes), name_of(view.dtype));
  if (view.device != spec.device) {
    invalid("device", name_of(spec.device), name_of(view.device));
  }
  if (elements == 0) return;
  if (view.data == nullptr) invalid("data", "a valid pointer", "null");
  const int last = view.rank - 1;
  if (spec.unit_last_stride && view.size(last) > 1 && view.stride(last) != 1) {
    invalid("last stride", "1", std::to_string(view.stride(last)));
  }
  for (int a = 0; a < view.rank; ++a) {
    const bool broadcast = view.stride(a) == 0 && view.size(a) > 1;
    if (view.stride(a) < 0 || (spec.writable && broadcast)) {
      invalid("strides", spec.writable ? "positive" : "non-negative",
              std::to_string(view.stride(a)) + " on axis " + std::to_string(a));
    }
  }
}

void check_slots(std::string_view operation, std::string_view name, const ConstTensorView& view,
                 std::int64_t least) {
  if (view.size(2) >= least) return;
  throw_invalid(operation, std::string(name) + "' number of slots",
                "at least " + std::to_string(least), std::to_string(view.size(2)));
}

void check_same_dtype(std::string_view operation, std::string_view name,
                      const ConstTensorView& view, const ConstTensorView& queries) {
  if (view.dtype == queries.dtype) return;
  throw_invalid(operation, std::string(name) + "' dtype",
                std::string(name_of(queries.dtype)) + " as queries", name_of(view.dtype));
}

void check_score_options(std::string_view operation, const ScoreOptions& options) {
  const auto check = [&](std::string_view what, double value) {
    if (std::isfinite(value) && value >= 0.0) return;
    throw_invalid(operation, what, "finite and non-negative", std::to_string(value));
  };
  check("scale", options.scale);
  check("softcap", options.softcap);
}

double scale_of(const ScoreOptions& options, std::int64_t head_dim) {
  return options.scale > 0.0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

void check_attended(std::string_view operation, const ConstTensorView& queries,
                    const ConstTensorView& keys, const ConstTensorView& values, std::int64_t slots,
                    const TensorView& out) {
  check_tensor(values, {.operation = operation,
                        .name = "values",
                        .axes = "(B, Hkv, S, D)",
                        .extents = {keys.size(0), keys.size(1), kAny, keys.size(3)},
                        .dtypes = {DType::f32, DType::f16, DType::bf16},
                        .device = keys.device});
  check_slots(operation, "values", values, slots);
  check_same_dtype(operation, "values", values, queries);
  check_tensor(out, {.operation = operation,
                     .name = "out",
                     .axes = "(B, Hq, D)",
                     .extents = {keys.size(0), queries.size(1), keys.size(3)},
                     .dtypes = {queries.dtype},
                     .device = keys.device,
                     .unit_last_stride = true,
                     .writable = true});
}

void check_range(std::string_view operation, std::string_view what, std::int64_t value,
                 std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  throw_invalid(operation, what, "in [" + std::to_string(low) + ", " + std::to_string(high) + "]",
                std::to_string(value));
}

}  // namespace spectralkv::detail
