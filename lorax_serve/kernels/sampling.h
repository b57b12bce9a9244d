// From logits to tokens: the most probable one, or one drawn from the nucleus without a sort.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "vec.h"

namespace lorax {

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

inline int end_of(int chunk, int vocab) { return std::min(vocab, (chunk + 1) * CHUNK); }

// The first index of the largest logit; -1 if a logit is NaN or infinite.
inline int32_t most_probable(const float* logits, int vocab) {
  float best = -INFINITY;
  int best_chunk = 0;
  V differences = zero();  // 0, or NaN from NaN or infinity
  for (int c = 0; c * CHUNK < vocab; c++) {
    V most = all(-INFINITY);
    const int end = end_of(c, vocab);
    for (int i = c * CHUNK; i < end; i += PANEL) {
      const V v = load_first(logits + i, end - i);
      differences = differences + (v - v);
      most = larger(most, first(end - i, v, most));
    }
    const float here = largest(most);
    if (here > best) best = here, best_chunk = c;
  }
  if (std::isnan(sum(differences))) return -1;
  int32_t i = best_chunk * CHUNK;
  while (logits[i] != best) i++;
  return i;
}

// The mass of entries above `floor`, kept by chunk in `sums`.
inline double mass_above(const float* p, int vocab, float floor, double* sums) {
  double total = 0;
  for (int c = 0; c * CHUNK < vocab; c++) {
    V mass = zero();
    const int end = end_of(c, vocab);
    for (int i = c * CHUNK; i < end; i += PANEL)
      mass = mass + above(load_first(p + i, end - i), all(floor));
    sums[c] = sum(mass);
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
      for (int i = c * CHUNK; i < end_of(c, vocab); i++) {
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
  V most = all(-INFINITY);
  for (int i = 0; i < vocab; i += PANEL)
    most = larger(most, first(vocab - i, load_first(logits + i, vocab - i), most));
  const V shift = all(largest(most)), scale = all(1.0f / temperature);
  for (int i = 0; i < vocab; i += PANEL)
    store_first(p + i, vocab - i, exp((load_first(logits + i, vocab - i) - shift) * scale));
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
