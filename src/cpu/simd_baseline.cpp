#include "cpu/simd_kernels.inc"

namespace spectralkv::detail {

extern const SimdKernels kSimdBaseline;
constinit const SimdKernels kSimdBaseline = make_table("baseline");

}  // namespace spectralkv::detail
