// The two element types, as the few vector operations that the kernels are written in.
//
// Products accumulate in float32 whatever the element. A "step" is what one multiply-accumulate
// consumes of the reduced dimension: one float, or a pair of bfloat16 (VDPBF16PS).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace lorax {

using V = __m512;  // 16 float32

inline V zero() { return _mm512_setzero_ps(); }

struct F32 {
  using T = float;
  static constexpr int STEP = 1;    // elements of the reduced dimension a multiply consumes
  static constexpr int DOT = 16;    // elements of a register in a dot product
  using Reg = __m512;

  static Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static Reg broadcast(const T* p) { return _mm512_set1_ps(*p); }
  static V multiply(V sum, Reg a, Reg b) { return _mm512_fmadd_ps(a, b, sum); }
  static V widen(const T* p) { return _mm512_loadu_ps(p); }
  static void narrow(T* p, V v) { _mm512_storeu_ps(p, v); }
  static float to_float(T v) { return v; }
  static T from_float(float v) { return v; }
};

struct BF16 {
  using T = uint16_t;
  static constexpr int STEP = 2;
  static constexpr int DOT = 32;
  using Reg = __m512bh;

  static Reg load(const T* p) { return (Reg)_mm512_loadu_si512(p); }
  static Reg broadcast(const T* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    return (Reg)_mm512_set1_epi32(pair);
  }
  static V multiply(V sum, Reg a, Reg b) { return _mm512_dpbf16_ps(sum, a, b); }
  static V widen(const T* p) {
    const __m256i half = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void narrow(T* p, V v) {
    const __m256bh half = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &half, 32);
  }
  static float to_float(T v) {
    const uint32_t bits = uint32_t(v) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
  static T from_float(float v) {
    const __m128bh pair = _mm_cvtneps_pbh(_mm_set_ss(v));
    T result;
    std::memcpy(&result, &pair, 2);
    return result;
  }
};

// Sums of eight registers' lanes, in order.
inline __m256 sum_lanes(const V v[8]) {
  __m256 s[8];
  for (int i = 0; i < 8; i++)
    s[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  const __m256 ab = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 cd = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(ab, cd, 0x20), _mm256_permute2f128_ps(ab, cd, 0x31));
}

// e**x by 2**n * p(f), |f| <= 1/2; relative error 2e-7; 0 for x = -infinity; NaN stays NaN.
inline V exp(V x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);  // in this order, NaN passes
  const V t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const V n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const V f = _mm512_sub_ps(t, n);
  V p = _mm512_set1_ps(1.53533631e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33988668e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61843736e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55033136e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226477e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147182e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

}  // namespace lorax
