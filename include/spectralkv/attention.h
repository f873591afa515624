// The attention of one token a sequence over its cache.
#pragma once

#include <cstdint>

#include "spectralkv/export.h"
#include "spectralkv/stream.h"
#include "spectralkv/tensor.h"

namespace spectralkv {

/// How the model turns dot products into attention.
struct ScoreOptions {
  double scale = 0.0;    ///< factor of the dot products; 0: 1 / sqrt(head_dim)
  double softcap = 0.0;  ///< scores become softcap * tanh(score / softcap); 0: as they are
};

/// Writes to `out` (B, Hq, D) the attention of one token a sequence over slots [0, length) of its
/// cache: what GraphManager::attend computes, without a graph.
///
/// `query` (B, Hq, D), `keys` and `values` (B, Hkv, S, D) with S >= length and Hq a multiple of
/// Hkv; f32, f16 or bf16, `out` as well, and all the same. `positions` i32 (B, Hkv, S'), with
/// S' >= length: a slot whose position is negative is not attended to; empty view: all are. The
/// last axes are contiguous, the others have any stride. A score that is not finite counts as none,
/// and where a head has no score at all its output is NaN.
///
/// All tensors lie on `device`. On the CPU the call has finished when it returns. On CUDA it is
/// queued on `stream`, takes no memory, never waits, and may be captured into a CUDA graph; D is at
/// most 256 there.
///
/// Throws InvalidArgument where an argument is wrong and BackendUnavailable where there is no such
/// device.
SPECTRALKV_API void decode_attention(const ConstTensorView& query, const ConstTensorView& keys,
                                     const ConstTensorView& values,
                                     const ConstTensorView& positions, std::int64_t length,
                                     const TensorView& out, const ScoreOptions& options,
                                     Device device, Stream stream);

}  // namespace spectralkv
