#include "cpu/simd.h"

namespace spectralkv::detail {

extern const SimdKernels kSimdBaseline;
#ifdef SPECTRALKV_HAVE_AVX2
extern const SimdKernels kSimdAvx2;
#endif
#ifdef SPECTRALKV_HAVE_AVX512
extern const SimdKernels kSimdAvx512;
#endif

SimdChoices simd_choices() noexcept {
  SimdChoices choices{};
#ifdef SPECTRALKV_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma")) {
    choices.tables[choices.count++] = &kSimdAvx512;
  }
#endif
#ifdef SPECTRALKV_HAVE_AVX2
  // Every processor with AVX2 and FMA has F16C, which GCC 12 cannot ask for by name.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    choices.tables[choices.count++] = &kSimdAvx2;
  }
#endif
  choices.tables[choices.count++] = &kSimdBaseline;
  return choices;
}

const SimdKernels& simd_kernels() noexcept {
  static const SimdKernels& best = *simd_choices().tables[0];
  return best;
}

}  // namespace spectralkv::detail
