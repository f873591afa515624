#include "cpu/simd_kernels.inc"

namespace spectralkv::detail {

extern const SimdKernels kSimdAvx512;
constinit const SimdKernels kSimdAvx512 = make_table("avx512");

}  // namespace spectralkv::detail
