// vec.h in AVX2 with FMA; a pair of bfloat16 is widened to two floats, the even one and the odd.
#pragma once
#include <immintrin.h>

namespace lorax {

struct V {
  __m256 lo, hi;
};

constexpr int TILE = 6;          // rows of x and panels of weights whose products are kept in
constexpr int TILE_PANELS = 1;   // registers: 12 accumulators of 16 registers
constexpr int WIDE = 1;          // registers of values that attention weighs at a time
constexpr int FEW_RANKS = 2;     // rows of A that two rows of x are multiplied with at a time, waiting
constexpr int MANY_RANKS = 2;    // for memory and not

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline V operator+(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V operator/(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V fma(V a, V b, V c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V larger(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V smaller(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline float sum(V v) {
  const __m256 s = _mm256_add_ps(v.lo, v.hi);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
inline float largest(V v) {
  const __m256 s = _mm256_max_ps(v.lo, v.hi);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}

inline __m256i lanes(long n, int from) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int count = n > 16 ? 16 : int(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count - from), index);
}
inline V first(long n, V v, V others) {
  return {_mm256_blendv_ps(others.lo, v.lo, _mm256_castsi256_ps(lanes(n, 0))),
          _mm256_blendv_ps(others.hi, v.hi, _mm256_castsi256_ps(lanes(n, 8)))};
}
inline V load_first(const float* p, long n) {
  if (n >= 16) return load(p);
  return {_mm256_maskload_ps(p, lanes(n, 0)), _mm256_maskload_ps(p + 8, lanes(n, 8))};
}
inline void store_first(float* p, long n, V v) {
  if (n >= 16) return store(p, v);
  _mm256_maskstore_ps(p, lanes(n, 0), v.lo);
  _mm256_maskstore_ps(p + 8, lanes(n, 8), v.hi);
}
inline V above(V v, V floor) {
  return {_mm256_and_ps(v.lo, _mm256_cmp_ps(v.lo, floor.lo, _CMP_GT_OQ)),
          _mm256_and_ps(v.hi, _mm256_cmp_ps(v.hi, floor.hi, _CMP_GT_OQ))};
}

inline V nearest(V v) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, how), _mm256_round_ps(v.hi, how)};
}
// 2**n for integers n in [-160, 128], by the exponent's bits: below 2**-126 it is 0, 2**128 is
// infinity. NaN has no exponent, but then v is NaN too.
inline __m256 power(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256i bits = _mm256_max_epi32(exponent, _mm256_setzero_si256());
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
inline V times_power_of_two(V v, V n) { return v * V{power(n.lo), power(n.hi)}; }

// The sums of eight registers' lanes, in order.
inline void sums(const V v[8], float out[8]) {
  __m256 s[8];
  for (int i = 0; i < 8; i++) s[i] = _mm256_add_ps(v[i].lo, v[i].hi);
  const __m256 ab = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 cd = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(ab, cd, 0x20),
                                      _mm256_permute2f128_ps(ab, cd, 0x31)));
}

struct BF16 {
  using T = uint16_t;
  static constexpr int STEP = 2, DOT = 32, PARTS = 2;
  struct Reg {
    __m256i lo, hi;   // 8 pairs each
  };

  static Reg load(const T* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
  }
  static Reg spread(const T* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    const __m256i v = _mm256_set1_epi32(pair);
    return {v, v};
  }
  static V part(Reg r, int odd) {
    if (odd) {
      const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
      return {_mm256_castsi256_ps(_mm256_and_si256(r.lo, upper)),
              _mm256_castsi256_ps(_mm256_and_si256(r.hi, upper))};
    }
    return {_mm256_castsi256_ps(_mm256_slli_epi32(r.lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(r.hi, 16))};
  }
  using Row = float;
  static V spread_part(const Row* x, int odd) { return all(x[odd]); }
  static V multiply_part(V sum, V a, V b) { return fma(a, b, sum); }
  static V multiply(V sum, Reg a, Reg b) {
    return fma(part(a, 1), part(b, 1), fma(part(a, 0), part(b, 0), sum));
  }
  static V widen(const T* p) {
    const auto eight = [](const T* q) {
      const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q));
      return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    };
    return {eight(p), eight(p + 8)};
  }
  // To nearest even; what the addition would carry out of a NaN's mantissa is kept a NaN.
  static __m256i round(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
    return _mm256_srli_epi32(kept, 16);
  }
  static void narrow(T* p, V v) {
    const __m256i words = _mm256_packus_epi32(round(v.lo), round(v.hi));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, 0xd8));
  }
  static float to_float(T v) { return bf16_to_float(v); }
  static T from_float(float v) {
    return T(_mm256_cvtsi256_si32(round(_mm256_set1_ps(v))));
  }
};

}  // namespace lorax
