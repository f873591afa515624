// The inner loops of the CPU backend, one table of them for each instruction set.
#pragma once

#include <cstdint>

#include "spectralkv/tensor.h"

namespace spectralkv::detail {

/// Walkers that step together: their random numbers are drawn as one vector.
inline constexpr int kWalkerLanes = 16;

/// Loops over rows of keys take the address of the first row, its dtype and the distance between
/// rows in elements. Scores and sums are f32 throughout.
struct SimdKernels {
  const char* name;

  /// Keys a packed panel holds.
  int panel_width;

  /// dst[i] = float(src[i])
  void (*load_row)(const void* src, DType dtype, std::int64_t n, float* dst);

  /// out[g * ld + j] = dot(queries[g * dim ...], keys[j]) for j < n, g < num_queries.
  void (*dot_keys)(const void* keys, DType dtype, std::int64_t stride, std::int64_t n,
                   std::int64_t dim, const float* queries, std::int64_t num_queries, float* out,
                   std::int64_t ld);

  /// panel[d * panel_width + j] = keys[j][d], zero for j in [n, panel_width).
  void (*pack_panel)(const void* keys, DType dtype, std::int64_t stride, std::int64_t n,
                     std::int64_t dim, float* panel);

  /// out[r * ld + j] = dot(rows[r * dim ...], key j of the panel) for j < panel_width.
  void (*panel_scores)(const float* panel, std::int64_t dim, const float* rows,
                       std::int64_t num_rows, float* out, std::int64_t ld);

  /// scores[j] *= scale, -inf where that is not finite or positions[j] < 0; returns the maximum.
  /// `positions` may be null: all slots hold tokens.
  float (*mask_scores)(float* scores, std::int64_t n, float scale, const std::int32_t* positions);

  /// scores[j] = exp(scores[j] - maximum), 0 for -inf; returns the sum.
  float (*exp_sum)(float* scores, std::int64_t n, float maximum);

  /// sum[j] += factor * x[j]
  void (*add_scaled)(float* sum, const float* x, std::int64_t n, float factor);

  /// sums[g * dim + d] += sum over j < n of weights[g * ld + j] * rows[j][d], g < num_sums, where
  /// rows with positions[j] < 0 are not looked at. `positions` may be null.
  void (*add_weighted_rows)(const void* rows, DType dtype, std::int64_t stride, std::int64_t n,
                            std::int64_t dim, const std::int32_t* positions, const float* weights,
                            std::int64_t ld, std::int64_t num_sums, float* sums);

  /// The up to k largest positive values of `values`, in descending order, of equal ones the lower
  /// index, passing over index `self` and every index whose position is below `first_position`.
  /// Returns how many there are.
  int (*top_k)(const float* values, std::int64_t n, int k, const std::int32_t* positions,
               std::int32_t first_position, std::int64_t self, std::int32_t* indices, float* best);

  /// sum += keys[j] / |keys[j]| over the n finite keys with positions[j] >= 0;
  /// inverse_norms[j] = 1 / |keys[j]| (0 for a zero key), -1 for every key that was left out.
  void (*sum_directions)(const void* keys, DType dtype, std::int64_t stride, std::int64_t n,
                         std::int64_t dim, const std::int32_t* positions, float* sum,
                         float* inverse_norms);

  /// Philox4x32-10 for kWalkerLanes neighbouring subsequences, from `subsequence` on:
  /// out[(4 * b + i) * kWalkerLanes + lane] is word i of block `first_block + b`.
  void (*philox_lanes)(std::uint64_t seed, std::uint64_t subsequence, std::uint64_t first_block,
                       std::int64_t num_blocks, std::uint32_t* out);
};

/// The table for the best instruction set of this processor.
const SimdKernels& simd_kernels() noexcept;

/// All tables this processor can run, the best first.
struct SimdChoices {
  const SimdKernels* tables[3];
  int count;
};
SimdChoices simd_choices() noexcept;

}  // namespace spectralkv::detail
