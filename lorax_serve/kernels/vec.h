// Vectors of 16 floats and the two element types, as the few operations that the kernels are
// written in. Two instruction sets have them: AVX-512 with bfloat16, and AVX2.
//
// Products accumulate in float32 whatever the element. A "step" is what one multiply consumes of
// the reduced dimension: one float, or a pair of bfloat16.
//
//   V                      16 floats; + - * / by lanes
//   fma(a, b, c)           a * b + c
//   larger(a, b)           by lanes; b where one is NaN
//   sum(v), largest(v)     over the lanes
//   first(n, v, w)         v in the lanes below n, w in the others
//   load_first(p, n)       n floats, then zeros; nothing else is read
//   store_first(p, n, v)   nothing else is written
//   above(v, floor)        v where it is more than floor, else 0
//   exp(v)                 relative error 2e-7; 0 for -infinity; NaN stays NaN
//
//   E::T, E::STEP, E::DOT  element; elements of a step; elements of a Reg in a dot product
//   E::load, E::spread     a Reg: 16 steps that follow each other; one step in all lanes
//   E::multiply(s, a, b)   s + a * b, each lane over its step
//   E::Row, E::PARTS       where multiply would take several instructions, tiles of several rows
//                          share them: rows are of another element, and a step has several parts
//   E::part(reg, i), E::spread_part(row, i), E::multiply_part(s, a, b)
//   E::widen, E::narrow    16 elements to and from V, rounded to nearest even
#pragma once
#include <cstdint>
#include <cstring>

namespace lorax {

inline float bf16_to_float(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

}  // namespace lorax

#ifdef __AVX512BF16__
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace lorax {

struct F32 {
  using T = float;
  static constexpr int STEP = 1, DOT = 16, PARTS = 1;
  using Reg = V;

  static Reg load(const T* p) { return lorax::load(p); }
  static Reg spread(const T* p) { return all(*p); }
  static V multiply(V sum, Reg a, Reg b) { return fma(a, b, sum); }
  using Row = float;
  static V part(Reg r, int) { return r; }
  static V spread_part(const Row* x, int) { return all(*x); }
  static V multiply_part(V sum, V a, V b) { return fma(a, b, sum); }
  static V widen(const T* p) { return lorax::load(p); }
  static void narrow(T* p, V v) { store(p, v); }
  static float to_float(T v) { return v; }
  static T from_float(float v) { return v; }
};

// 2**f by a polynomial, |f| <= 1/2.
inline V power_of_two(V f) {
  V p = all(1.53533631e-4f);
  p = fma(p, f, all(1.33988668e-3f));
  p = fma(p, f, all(9.61843736e-3f));
  p = fma(p, f, all(5.55033136e-2f));
  p = fma(p, f, all(2.40226477e-1f));
  p = fma(p, f, all(6.93147182e-1f));
  return fma(p, f, all(1.0f));
}

inline V exp(V x) {
  // Beyond these bounds the result is 0 or infinity. In this order of arguments, NaN passes.
  x = smaller(all(89.0f), larger(all(-110.0f), x));
  const V t = x * all(1.44269504088896341f);
  const V n = nearest(t);
  return times_power_of_two(power_of_two(t - n), n);
}

}  // namespace lorax
