#include <gtest/gtest.h>

#include <array>
#include <string>
#include <type_traits>

#include "spectralkv/error.h"
#include "spectralkv/tensor.h"

namespace spectralkv::test {
namespace {

static_assert(std::is_convertible_v<TensorView, ConstTensorView>);
static_assert(!std::is_convertible_v<ConstTensorView, TensorView>);
static_assert(std::is_trivially_copyable_v<TensorView>);
static_assert(std::is_base_of_v<Error, InvalidArgument>);
static_assert(std::is_base_of_v<Error, BackendUnavailable>);
static_assert(std::is_base_of_v<Error, CudaError>);

TEST(Tensor, KnowsSizesAndNames) {
  EXPECT_EQ(size_of(DType::f32), 4);
  EXPECT_EQ(size_of(DType::f16), 2);
  EXPECT_EQ(size_of(DType::bf16), 2);
  EXPECT_EQ(size_of(DType::i32), 4);
  EXPECT_EQ(size_of(DType::u32), 4);
  EXPECT_EQ(size_of(DType::u8), 1);
  EXPECT_STREQ(name_of(DType::f32), "float32");
  EXPECT_STREQ(name_of(DType::f16), "float16");
  EXPECT_STREQ(name_of(DType::bf16), "bfloat16");
  EXPECT_STREQ(name_of(DType::i32), "int32");
  EXPECT_STREQ(name_of(DType::u32), "uint32");
  EXPECT_STREQ(name_of(DType::u8), "uint8");
  EXPECT_EQ(name_of(Device{}), "cpu");
  EXPECT_EQ(name_of(Device{DeviceType::cuda, 3}), "cuda:3");
}

TEST(Tensor, IsRowMajorWithoutStrides) {
  std::array<float, 24> memory{};
  const TensorView view(memory.data(), DType::f32, {2, 3, 4});
  EXPECT_EQ(view.rank, 3);
  EXPECT_EQ(view.size(0), 2);
  EXPECT_EQ(view.size(1), 3);
  EXPECT_EQ(view.size(2), 4);
  EXPECT_EQ(view.stride(0), 12);
  EXPECT_EQ(view.stride(1), 4);
  EXPECT_EQ(view.stride(2), 1);
  EXPECT_EQ(view.device, Device{});
  EXPECT_FALSE(view.empty());
}

TEST(Tensor, MayBeReadWhereItMayBeWritten) {
  std::array<float, 6> memory{};
  TensorView view(memory.data(), DType::f32, {2, 3}, {DeviceType::cuda, 1});
  view.strides[0] = 17;
  const ConstTensorView read = view;
  EXPECT_EQ(read.data, memory.data());
  EXPECT_EQ(read.dtype, DType::f32);
  EXPECT_EQ(read.device, (Device{DeviceType::cuda, 1}));
  EXPECT_EQ(read.rank, 2);
  EXPECT_EQ(read.stride(0), 17);
}

TEST(Tensor, IsEmptyWithoutAxes) {
  EXPECT_TRUE(TensorView{}.empty());
  EXPECT_TRUE(ConstTensorView{}.empty());
  float value = 0.0F;
  EXPECT_FALSE(TensorView(&value, DType::f32, {}).empty());
  EXPECT_FALSE(TensorView(nullptr, DType::f32, {0}).empty());
}

TEST(Tensor, HasFiveAxesAtMost) {
  float value = 0.0F;
  EXPECT_EQ(TensorView(&value, DType::f32, {1, 1, 1, 1, 1}).rank, 5);
  EXPECT_THROW(TensorView(&value, DType::f32, {1, 1, 1, 1, 1, 1}), InvalidArgument);
}

}  // namespace
}  // namespace spectralkv::test
