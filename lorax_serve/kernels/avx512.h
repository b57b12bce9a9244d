// vec.h in AVX-512; bfloat16 by VDPBF16PS, which takes a pair at once.
#pragma once
#include <immintrin.h>

namespace lorax {

using V = __m512;

constexpr int TILE = 8;          // rows of x and panels of weights whose products are kept in
constexpr int TILE_PANELS = 2;   // registers: 16 accumulators of 32 registers
constexpr int WIDE = 4;          // registers of values that attention weighs at a time
constexpr int FEW_RANKS = 1;     // rows of A that two rows of x are multiplied with at a time, waiting
constexpr int MANY_RANKS = 8;    // for memory and not

inline V zero() { return _mm512_setzero_ps(); }
inline V all(float v) { return _mm512_set1_ps(v); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
inline float sum(V v) { return _mm512_reduce_add_ps(v); }
inline float largest(V v) { return _mm512_reduce_max_ps(v); }

inline __mmask16 lanes(long n) { return n >= 16 ? 0xffff : (1u << n) - 1; }
inline V first(long n, V v, V others) { return _mm512_mask_mov_ps(others, lanes(n), v); }
inline V load_first(const float* p, long n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
inline void store_first(float* p, long n, V v) { _mm512_mask_storeu_ps(p, lanes(n), v); }
inline V above(V v, V floor) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, floor, _CMP_GT_OQ), v);
}

inline V nearest(V v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline V times_power_of_two(V v, V n) { return _mm512_scalef_ps(v, n); }

// The sums of eight registers' lanes, in order.
inline void sums(const V v[8], float out[8]) {
  __m256 s[8];
  for (int i = 0; i < 8; i++)
    s[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  const __m256 ab = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 cd = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(ab, cd, 0x20),
                                      _mm256_permute2f128_ps(ab, cd, 0x31)));
}

struct BF16 {
  using T = uint16_t;
  static constexpr int STEP = 2, DOT = 32, PARTS = 1;
  using Reg = __m512bh;

  static Reg load(const T* p) { return (Reg)_mm512_loadu_si512(p); }
  static Reg spread(const T* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    return (Reg)_mm512_set1_epi32(pair);
  }
  static V multiply(V sum, Reg a, Reg b) { return _mm512_dpbf16_ps(sum, a, b); }
  using Row = T;
  static Reg part(Reg r, int) { return r; }
  static Reg spread_part(const Row* x, int) { return spread(x); }
  static V multiply_part(V sum, Reg a, Reg b) { return multiply(sum, a, b); }
  static V widen(const T* p) {
    const __m256i half = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void narrow(T* p, V v) {
    const __m256bh half = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &half, 32);
  }
  static float to_float(T v) { return bf16_to_float(v); }
  static T from_float(float v) {
    const __m128bh pair = _mm_cvtneps_pbh(_mm_set_ss(v));
    T result;
    std::memcpy(&result, &pair, 2);
    return result;
  }
};

}  // namespace lorax
