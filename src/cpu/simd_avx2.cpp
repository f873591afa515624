#include "cpu/simd_kernels.inc"

namespace spectralkv::detail {

extern const SimdKernels kSimdAvx2;
constinit const SimdKernels kSimdAvx2 = make_table("avx2");

}  // namespace spectralkv::detail
