// Matrix products on the tensor cores, and the copies and barriers that feed them.
//
// Tiles in shared memory: rows of 64 elements (128 bytes) in panels, panel p holding elements
// [64 p, 64 p + 64) of every row; the eight 16-byte chunks of a row are swapped by its number,
// which is the order that both ldmatrix and Hopper's matrix descriptors ("128-byte swizzle") read
// without bank conflicts. Panels start at multiples of 1024 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace spectralkv::cuda {

// Hopper's asynchronous products exist in code for 90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPECTRALKV_HAVE_WGMMA 1
#else
#define SPECTRALKV_HAVE_WGMMA 0
#endif

inline constexpr int kPanelBytes = 128;  ///< of a row
inline constexpr int kPanelElements = 64;
inline constexpr int kChunkBytes = 16;
inline constexpr int kWarpgroup = 128;  ///< threads
/// A warpgroup's product is kTileRows x kTileColumns: warp w has rows [16 w, 16 w + 16), and a lane
/// of it rows lane / 4 and lane / 4 + 8, of columns 8 i + 2 (lane % 4) + {0, 1}.
inline constexpr int kTileRows = 64;
inline constexpr int kTileColumns = 128;

/// acc[4 i + 2 r + e]: row lane / 4 + 8 r, column 8 i + 2 (lane % 4) + e.
using Accumulator = float[kTileColumns / 2];

/// Offset of a chunk in a tile of `rows` rows.
__device__ inline int chunk_offset(int rows, int row, int chunk) {
  return (chunk / 8 * rows + row) * kPanelBytes + ((chunk ^ row) & 7) * kChunkBytes;
}

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// ---- barriers of shared memory

__device__ inline void barrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile(
      "{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier)
      : "memory");
}
__device__ inline bool barrier_passed(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t passed = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
#endif
  return passed != 0;
}
/// Waits for the end of the phase of that parity.
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  while (!barrier_passed(barrier, parity)) {
  }
}

/// Of the threads of a warpgroup alone; `name` is 1 or more.
__device__ inline void warpgroup_sync(int name) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(name), "n"(kWarpgroup) : "memory");
}
__device__ inline bool warpgroup_any(int name, bool value) {
  std::uint32_t any = 0;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.u32 p, %1, 0;\n barrier.cta.red.or.pred q, %2, %3, p;\n"
      " selp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<std::uint32_t>(value)), "r"(name), "n"(kWarpgroup)
      : "memory");
  return any != 0;
}

// ---- copies from global to shared memory

/// 16 bytes; zeros where `there` is false.
__device__ inline void copy_chunk(std::uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? kChunkBytes : 0)
               : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kPending groups of this thread are under way.
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
/// What this thread wrote to shared memory may now be read by asynchronous products.
__device__ inline void publish_to_products() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- products

/// acc (16 x 8) += a (16 x 16) b (16 x 8)
template <class T>
__device__ inline void multiply(float* acc, std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

#if SPECTRALKV_HAVE_WGMMA

/// A K-major tile from `address` on: 8 rows (1024 bytes) a core matrix, 128-byte swizzle.
__device__ inline std::uint64_t tile_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62U;
  constexpr std::uint64_t kNextRows = std::uint64_t{1024 >> 4} << 32U;
  constexpr std::uint64_t kUnused = std::uint64_t{1} << 16U;
  return kSwizzle128 | kNextRows | kUnused | ((address & 0x3ffffU) >> 4U);
}

#define SPECTRALKV_ACC4(i) "+f"(acc[i]), "+f"(acc[(i) + 1]), "+f"(acc[(i) + 2]), "+f"(acc[(i) + 3])
#define SPECTRALKV_ACC16(i) \
  SPECTRALKV_ACC4(i), SPECTRALKV_ACC4((i) + 4), SPECTRALKV_ACC4((i) + 8), SPECTRALKV_ACC4((i) + 12)
#define SPECTRALKV_WGMMA(type)                                                                \
  asm volatile(                                                                               \
      "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "              \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "      \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "      \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "     \
      "%64, %65, p, 1, 1, 0, 0;\n}"                                                           \
      : SPECTRALKV_ACC16(0), SPECTRALKV_ACC16(16), SPECTRALKV_ACC16(32), SPECTRALKV_ACC16(48) \
      : "l"(a), "l"(b), "r"(add))

/// acc (64 x 128) = or += a (64 x 16) b (128 x 16)^T, by the warpgroup, under way on return.
template <class T>
__device__ inline void multiply_async(Accumulator& acc, std::uint64_t a, std::uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>) {
    SPECTRALKV_WGMMA("f16");
  } else {
    SPECTRALKV_WGMMA("bf16");
  }
}
#undef SPECTRALKV_WGMMA
#undef SPECTRALKV_ACC16
#undef SPECTRALKV_ACC4

#endif  // SPECTRALKV_HAVE_WGMMA

/// acc = a (kTileRows rows) b (kTileColumns rows)^T over `steps` times 16 elements, by a warpgroup.
/// It may be under way until finish_product.
template <class T>
__device__ inline void start_product(Accumulator& acc, std::uint32_t a, std::uint32_t b,
                                     int steps) {
#if SPECTRALKV_HAVE_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  std::uint64_t rows = tile_descriptor(a);
  std::uint64_t columns = tile_descriptor(b);
  // Panels end in zeros: whole ones are multiplied, without branches.
  for (int first = 0; first < steps; first += 4) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      // Descriptors count 16 bytes.
      constexpr int kStep = 2;
      multiply_async<T>(acc, rows + kStep * step, columns + kStep * step, first + step);
    }
    rows += kTileRows * kPanelBytes / 16;
    columns += kTileColumns * kPanelBytes / 16;
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
#pragma unroll
  for (int i = 0; i < kTileColumns / 2; ++i) acc[i] = 0.0F;
  const auto load = [](std::uint32_t (&r)[4], std::uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  };
  for (int step = 0; step < steps; ++step) {
    std::uint32_t rows[4];
    load(rows, a + chunk_offset(kTileRows, 16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int j = 0; j < kTileColumns / 16; ++j) {
      std::uint32_t columns[4];
      load(columns, b + chunk_offset(kTileColumns, 16 * j + lane % 8 + lane / 16 * 8,
                                     2 * step + lane / 8 % 2));
      multiply<T>(acc + 8 * j, rows[0], rows[1], rows[2], rows[3], columns[0], columns[1]);
      multiply<T>(acc + 8 * j + 4, rows[0], rows[1], rows[2], rows[3], columns[2], columns[3]);
    }
  }
#endif
}
__device__ inline void finish_product([[maybe_unused]] Accumulator& acc) {
#if SPECTRALKV_HAVE_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kTileColumns / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
#endif
}

/// The warps that only copy give registers to those that compute.
__device__ inline void keep_few_registers() {
#if SPECTRALKV_HAVE_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
}
__device__ inline void take_many_registers() {
#if SPECTRALKV_HAVE_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
}

#endif  // __CUDA_ARCH__ >= 800

}  // namespace spectralkv::cuda
