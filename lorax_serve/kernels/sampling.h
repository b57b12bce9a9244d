// From logits to tokens: the most probable one, or one drawn from the nucleus without a sort.
#pragma once
#include <omp.h>

#include <cmath>

#include "vec.h"

namespace lorax {

constexpr int LANES = 16;
constexpr int CHUNK = 512;  // logits whose sum is kept, so that a draw need not add them all again

// A number in [0, 1), a pure function of its arguments (SplitMix64, OOPSLA 2014).
inline double uniform(uint64_t seed, uint64_t position, uint64_t attempt) {
  uint64_t z = seed;
  for (const uint64_t word : {position, attempt}) {
    z += 0x9E3779B97F4A7C15ull * (word + 1);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
  }
  return (z >> 11) * 0x1.0p-53;
}

inline __mmask16 lanes_below(long n) { return n >= LANES ? 0xffff : (1u << n) - 1; }

// The first index of the largest logit; -1 if a logit is NaN or infinite.
inline int32_t most_probable(const float* logits, int vocab) {
  V most = _mm512_set1_ps(-INFINITY), sum = zero();
  __m512i where = _mm512_setzero_si512();
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < vocab; i += LANES) {
    const __mmask16 valid = lanes_below(vocab - i);
    const V v = _mm512_maskz_loadu_ps(valid, logits + i);
    sum = _mm512_add_ps(sum, _mm512_sub_ps(v, v));  // 0, or NaN from NaN or infinity
    const __mmask16 more = _mm512_mask_cmp_ps_mask(valid, v, most, _CMP_GT_OQ);
    most = _mm512_mask_mov_ps(most, more, v);
    where = _mm512_mask_mov_epi32(where, more, index);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(LANES));
  }
  if (std::isnan(_mm512_reduce_add_ps(sum))) return -1;
  const V best = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  const __mmask16 equal = _mm512_cmp_ps_mask(most, best, _CMP_EQ_OQ);
  return _mm512_mask_reduce_min_epi32(equal, where);
}

// The mass of entries above `floor`, kept by chunk in `sums`.
inline double mass_above(const float* p, int vocab, float floor, double* sums) {
  const V least = _mm512_set1_ps(floor);
  double total = 0;
  for (int c = 0; c * CHUNK < vocab; c++) {
    V sum = zero();
    const int end = vocab < (c + 1) * CHUNK ? vocab : (c + 1) * CHUNK;
    for (int i = c * CHUNK; i < end; i += LANES) {
      const V v = _mm512_maskz_loadu_ps(lanes_below(end - i), p + i);
      sum = _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(v, least, _CMP_GT_OQ), sum, v);
    }
    sums[c] = _mm512_reduce_add_ps(sum);
    total += sums[c];
  }
  return total;
}

// The entry above `floor` in which the running sum passes `target`.
inline int32_t find(const float* p, int vocab, float floor, const double* sums, double target) {
  const int chunks = (vocab + CHUNK - 1) / CHUNK;
  int32_t last = -1;
  for (int c = 0; c < chunks; c++) {
    if (sums[c] == 0) continue;
    if (target >= sums[c] && c + 1 < chunks) {
      target -= sums[c];
    } else {
      for (int i = c * CHUNK; i < vocab && i < (c + 1) * CHUNK; i++) {
        if (p[i] <= floor) continue;
        last = i;
        target -= p[i];
        if (target < 0) return i;
      }
      target = 0;  // rounding: the next entry there is
    }
  }
  if (last >= 0) return last;
  for (int32_t i = vocab - 1; i >= 0; i--)
    if (p[i] > floor) return i;
  return 0;
}

// Draws from softmax(logits / temperature) cut by top-p: a token is in the nucleus exactly if the
// tokens more probable than it have less mass than top_p. One that is not rules out all that are
// no more probable, and the next attempt draws from the rest. `p` has room for the vocabulary,
// `sums` for two numbers a chunk.
inline int32_t draw(const float* logits, int vocab, float temperature, double top_p, uint64_t seed,
                    uint64_t position, float* p, double* sums) {
  V most = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < vocab; i += LANES)
    most = _mm512_mask_max_ps(most, lanes_below(vocab - i), most,
                              _mm512_maskz_loadu_ps(lanes_below(vocab - i), logits + i));
  const V shift = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  const V scale = _mm512_set1_ps(1.0f / temperature);
  for (int i = 0; i < vocab; i += LANES) {
    const __mmask16 valid = lanes_below(vocab - i);
    const V x = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, logits + i), shift);
    _mm512_mask_storeu_ps(p + i, valid, exp(_mm512_mul_ps(x, scale)));
  }
  float floor = 0;
  const double total = mass_above(p, vocab, floor, sums);
  double rest = total;
  double* above = sums + (vocab + CHUNK - 1) / CHUNK;
  for (uint64_t attempt = 0;; attempt++) {
    const int32_t token =
        find(p, vocab, floor, sums, uniform(seed, position, attempt) * rest);
    if (top_p >= 1) return token;
    rest = mass_above(p, vocab, p[token], above);
    if (rest < top_p * total) return token;
    floor = p[token];
    std::memcpy(sums, above, sizeof(double) * ((vocab + CHUNK - 1) / CHUNK));
  }
}

}  // namespace lorax
