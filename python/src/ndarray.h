// The one place where a framework's tensor becomes a view.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>

#include "spectralkv/error.h"
#include "spectralkv/stream.h"
#include "spectralkv/tensor.h"

namespace spectralkv::python {

/// Any DLPack tensor. Bind these with .noconvert(): a converted copy would be written in vain.
using Input = nanobind::ndarray<nanobind::ro>;
using Output = nanobind::ndarray<>;
using OptionalInput = std::optional<Input>;

inline DType dtype_of(nanobind::dlpack::dtype dtype) {
  using Code = nanobind::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) {
    return dtype.lanes == 1 && dtype.code == static_cast<std::uint8_t>(code) && dtype.bits == bits;
  };
  if (is(Code::Float, 32)) return DType::f32;
  if (is(Code::Float, 16)) return DType::f16;
  if (is(Code::Bfloat, 16)) return DType::bf16;
  if (is(Code::Int, 32)) return DType::i32;
  if (is(Code::UInt, 32)) return DType::u32;
  if (is(Code::UInt, 8) || is(Code::Bool, 8)) return DType::u8;
  throw InvalidArgument(
      "[tensor] dtype must be float32, float16, bfloat16, int32, uint32, uint8 or bool, got "
      "DLPack code " +
      std::to_string(dtype.code) + " with " + std::to_string(dtype.bits) + " bits");
}

inline Device device_of(int type, int index) {
  if (type == nanobind::device::cpu::value) return {DeviceType::cpu, 0};
  if (type == nanobind::device::cuda::value) return {DeviceType::cuda, index};
  throw InvalidArgument("[tensor] device must be the CPU or CUDA, got DLPack device type " +
                        std::to_string(type));
}

template <class View, class Array>
View make_view(const Array& array) {
  if (array.ndim() > kMaxRank) {
    throw InvalidArgument("[tensor] rank must be at most 5, got " + std::to_string(array.ndim()));
  }
  View view;
  view.data = array.data();
  view.dtype = dtype_of(array.dtype());
  view.device = device_of(array.device_type(), array.device_id());
  view.rank = static_cast<int>(array.ndim());
  for (std::size_t axis = 0; axis < array.ndim(); ++axis) {
    view.shape[axis] = static_cast<std::int64_t>(array.shape(axis));
    view.strides[axis] = array.stride(axis);
  }
  return view;
}

inline ConstTensorView view(const Input& array) { return make_view<ConstTensorView>(array); }
inline ConstTensorView view(const OptionalInput& array) {
  return array ? make_view<ConstTensorView>(*array) : ConstTensorView{};
}
inline TensorView writable(const Output& array) { return make_view<TensorView>(array); }

inline Stream stream_of(std::uintptr_t handle) {
  return {reinterpret_cast<void*>(handle)};  // NOLINT(*-int-to-ptr)
}

}  // namespace spectralkv::python
