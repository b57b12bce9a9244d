// RoPE, the write into the KV cache, and attention of decoding rows and of prompts.
//
// The cache is [slots, kv_heads, max_length, head_dim] a layer. qkv is [rows, (heads + 2 kv_heads)
// * head_dim]; its q and k are rotated in place.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "vec.h"

namespace lorax {

struct Attention {
  int32_t heads, kv_heads, head_dim, max_length;
  float scale, eps;
  const float* cos;     // [positions, head_dim / 2]
  const float* sin;
  const void* q_norm;   // [head_dim] or null
  const void* k_norm;
};

struct Prompt {             // a chunk of one sequence: rows [start, end)
  int32_t start, end;
};

struct Rows {
  const int32_t* kv_slot;   // [rows]
  const int32_t* position;  // [rows]
  const Prompt* prompts;
  int32_t num_rows;
  int32_t num_decodes;      // the first rows, each of another sequence
  int32_t num_prompts;
  int32_t by_rows;          // whether prompts' rows are attended as decoding rows are, bit for bit
};

// By halves, as Hugging Face checkpoints expect it.
template <class E>
inline void rotate(typename E::T* v, int dim, const float* cos, const float* sin) {
  const int half = dim / 2;
  if (half % PANEL) {
    for (int i = 0; i < half; i++) {
      const float a = E::to_float(v[i]), b = E::to_float(v[i + half]);
      v[i] = E::from_float(a * cos[i] - b * sin[i]);
      v[i + half] = E::from_float(b * cos[i] + a * sin[i]);
    }
    return;
  }
  for (int i = 0; i < half; i += PANEL) {
    const V a = E::widen(v + i), b = E::widen(v + i + half);
    const V c = load(cos + i), s = load(sin + i);
    E::narrow(v + i, a * c - b * s);
    E::narrow(v + i + half, b * c + a * s);
  }
}

constexpr int MAX_DIM = 256;

// scores[g][0..length) = scale * keys @ q[g] for G heads; a row of scores has room for a multiple
// of 16. The values at the same positions are fetched meanwhile: they are read next.
template <class E, int G>
void score(const typename E::T* const* q, const typename E::T* keys, const typename E::T* values,
           int dim, int length, float scale, float* scores, long ld) {
  using Part = decltype(E::part(E::load(*q), 0));
  Part parts[MAX_DIM / E::DOT * E::PARTS][G];
  const int blocks = dim / E::DOT;
  for (int b = 0; b < blocks; b++)
    for (int i = 0; i < E::PARTS; i++)
      for (int g = 0; g < G; g++)
        parts[b * E::PARTS + i][g] = E::part(E::load(q[g] + b * E::DOT), i);
  V acc[G][8];
  for (int p = 0; p < length; p += 8) {
    for (int i = 0; i < 8; i++) {
      // Past the end, the last position is repeated.
      const long at = long(std::min(p + i, length - 1)) * dim;
      for (int line = 0; line < dim; line += int(64 / sizeof(*keys)))
        _mm_prefetch((const char*)(values + at + line), _MM_HINT_T1);
      V dots[G];
      for (int g = 0; g < G; g++) dots[g] = zero();
      for (int b = 0; b < blocks; b++) {
        const auto key = E::load(keys + at + b * E::DOT);
        for (int j = 0; j < E::PARTS; j++) {
          const Part part = E::part(key, j);
          for (int g = 0; g < G; g++)
            dots[g] = E::multiply_part(dots[g], parts[b * E::PARTS + j][g], part);
        }
      }
      for (int g = 0; g < G; g++) acc[g][i] = dots[g];
    }
    for (int g = 0; g < G; g++) sums(acc[g], scores + g * ld + p);
  }
  for (int g = 0; g < G; g++)
    for (int p = 0; p < length; p += PANEL)
      store(scores + g * ld + p, load(scores + g * ld + p) * all(scale));
}

// In place; returns the reciprocal of the sum. scores has room for a multiple of 16.
inline float exponentials(float* scores, int length) {
  V most = all(scores[0]);
  for (int p = 0; p < length; p += PANEL)
    most = larger(most, first(length - p, load(scores + p), most));
  const V shift = all(largest(most));
  V total = zero();
  for (int p = 0; p < length; p += PANEL) {
    const V kept = first(length - p, exp(load(scores + p) - shift), zero());
    store(scores + p, kept);
    total = total + kept;
  }
  return 1.0f / sum(total);
}

// G heads' weighted sums of values, N registers of 16 columns. What heads see beyond the first one's
// length is added head by head: each sum is in one order, whatever heads are beside it.
template <class E, int G, int N>
void weigh(const float* scores, long ld_scores, const float* norms, const typename E::T* values,
           int dim, const int* lengths, int column, typename E::T* const* out) {
  V acc[G][N], v[N];
  for (int g = 0; g < G; g++)
    for (int n = 0; n < N; n++) acc[g][n] = zero();
  const auto fetch = [&](int p) {
    for (int n = 0; n < N; n++) v[n] = E::widen(values + long(p) * dim + column + n * PANEL);
  };
  const auto add = [&](int g, int p) {
    const V weight = all(scores[g * ld_scores + p]);
    for (int n = 0; n < N; n++) acc[g][n] = fma(weight, v[n], acc[g][n]);
  };
  for (int p = 0; p < lengths[0]; p++) {
    fetch(p);
    for (int g = 0; g < G; g++) add(g, p);
  }
  for (int g = 1; g < G; g++)
    for (int p = lengths[0]; p < lengths[g]; p++) {
      fetch(p);
      add(g, p);
    }
  for (int g = 0; g < G; g++)
    for (int n = 0; n < N; n++)
      E::narrow(out[g] + column + n * PANEL, acc[g][n] * all(norms[g]));
}

constexpr int HEADS = 6;   // that share what is read; their sums of values fill the registers

// G query heads of one kv head; each sees at least as much as the one before. scratch: G rows of
// scores.
template <class E, int G>
void attend_heads(const typename E::T* const* q, const typename E::T* keys,
                  const typename E::T* values, int dim, const int* lengths, float scale,
                  float* scratch, long ld, typename E::T* const* out) {
  float norms[G];
  score<E, G>(q, keys, values, dim, lengths[G - 1], scale, scratch, ld);
  for (int g = 0; g < G; g++) norms[g] = exponentials(scratch + g * ld, lengths[g]);
  int d = 0;
  for (; d + WIDE * PANEL <= dim; d += WIDE * PANEL)
    weigh<E, G, WIDE>(scratch, ld, norms, values, dim, lengths, d, out);
  for (; d + PANEL <= dim; d += PANEL)
    weigh<E, G, 1>(scratch, ld, norms, values, dim, lengths, d, out);
}

// Rows of one sequence that follow each other (one, if it decodes) and one kv head, for all query
// heads of the group: in the same order whatever rows are beside it. q and out are the first row's;
// `first` its position. scratch: HEADS rows of scores.
template <class E>
void attend_rows(const typename E::T* q, long q_width, const typename E::T* keys,
                 const typename E::T* values, int rows, int group, int dim, int first, float scale,
                 float* scratch, long ld, typename E::T* out, long out_width) {
  const int count = rows * group, tiles = (count + HEADS - 1) / HEADS;
  for (int t = 0; t < tiles; t++) {  // of nearly equal height
    const int begin = count * t / tiles, end = count * (t + 1) / tiles;
    const typename E::T* qs[HEADS];
    typename E::T* outs[HEADS];
    int lengths[HEADS];
    for (int m = begin; m < end; m++) {
      const int row = m / group, head = m % group;
      qs[m - begin] = q + row * q_width + head * dim;
      outs[m - begin] = out + row * out_width + head * dim;
      lengths[m - begin] = first + row + 1;
    }
    const auto attend = [&](auto heads) {
      attend_heads<E, decltype(heads)::value>(qs, keys, values, dim, lengths, scale, scratch, ld,
                                              outs);
    };
    switch (end - begin) {
      case 6: attend(std::integral_constant<int, 6>()); break;
      case 5: attend(std::integral_constant<int, 5>()); break;
      case 4: attend(std::integral_constant<int, 4>()); break;
      case 3: attend(std::integral_constant<int, 3>()); break;
      case 2: attend(std::integral_constant<int, 2>()); break;
      case 1: attend(std::integral_constant<int, 1>()); break;
    }
  }
}

constexpr int QUERY_ROWS = 32;   // rows of a prompt that a task takes
constexpr int KEYS = 64;         // positions that are packed, and attended to, at a time

// KEYS keys [position, dim] to panels of 16 positions, [KEYS / 16][dim / STEP][16][STEP]; positions
// from `valid` on become zero. A step is four bytes, whatever the element: 4 x 4 of them at a time.
template <class E>
void pack_keys(const typename E::T* keys, int dim, int valid, typename E::T* panels) {
  const int words = dim / E::STEP;
  for (int p = 0; p < KEYS; p += 4)
    for (int w = 0; w < words; w += 4) {
      __m128 block[4];
      for (int i = 0; i < 4; i++)
        block[i] = p + i < valid
                       ? _mm_loadu_ps((const float*)(keys + long(p + i) * dim + w * E::STEP))
                       : _mm_setzero_ps();
      _MM_TRANSPOSE4_PS(block[0], block[1], block[2], block[3]);
      float* place = (float*)panels + long(p / PANEL) * PANEL * words + p % PANEL;
      for (int i = 0; i < 4; i++) _mm_storeu_ps(place + (w + i) * PANEL, block[i]);
    }
}

// KEYS values [position, dim] to panels of 16 columns, [dim / 16][KEYS / STEP][16][STEP].
template <class E>
void pack_values(const typename E::T* values, int dim, int valid, typename E::T* panels) {
  using T = typename E::T;
  const T nothing[PANEL] = {};
  for (int d = 0; d < dim; d += PANEL)
    for (int p = 0; p < KEYS; p += E::STEP) {
      T* place = panels + long(d) * KEYS + p * PANEL;
      for (int i = 0; i < E::STEP; i++) {
        const T* row = p + i < valid ? values + long(p + i) * dim + d : nothing;
        for (int column = 0; column < PANEL; column++) place[column * E::STEP + i] = row[column];
      }
    }
}

// What a thread works in; the largest group and head of the model.
template <class E>
struct Scratch {
  float *scores, *out, *most, *sum;
  typename E::T *keys, *values;
  typename E::Row *queries, *weights;
  long ld;

  static long floats(int group, int dim, int max_length) {
    const long queries = long(QUERY_ROWS) * group;
    return HEADS * long(max_length + PANEL) + 2 * queries * dim + 2 * queries +
           2 * long(KEYS) * dim + TILE * KEYS;
  }
  Scratch(float* place, int group, int dim, int max_length) : ld(max_length + PANEL) {
    const long queries_count = long(QUERY_ROWS) * group;
    scores = place;
    out = scores + HEADS * ld;
    most = out + queries_count * dim;
    sum = most + queries_count;
    queries = (typename E::Row*)(sum + queries_count);
    keys = (typename E::T*)(queries + queries_count * dim);
    values = keys + long(KEYS) * dim;
    weights = (typename E::Row*)(values + long(KEYS) * dim);
  }
};

template <class E>
inline void put_row(typename E::Row* row, V v) {
  if constexpr (std::is_same_v<typename E::Row, float>)
    store(row, v);
  else
    E::narrow(row, v);
}

// Softmax over what has been seen (Milakov and Gimelshein, arXiv:1805.02867): the scores of one
// query become weights, and its earlier results are scaled to the new maximum.
template <class E>
void weigh_scores(float* scores, int seen, float scale, float* most, float* sum, float* out,
                  int dim, typename E::Row* weights) {
  V high = all(*most);
  for (int p = 0; p < seen; p += PANEL) {
    const V s = load(scores + p) * all(scale);
    store(scores + p, s);
    high = larger(high, first(seen - p, s, high));
  }
  const float now = largest(high);
  const V shift = all(now);
  V total = zero();
  for (int p = 0; p < KEYS; p += PANEL) {
    V e = zero();
    if (p < seen) e = first(seen - p, exp(load(scores + p) - shift), zero());
    put_row<E>(weights + p, e);
    total = total + e;
  }
  if (now > *most) {
    const float before = *most == -INFINITY ? 0.0f : std::exp(*most - now);
    *sum *= before;
    for (int d = 0; d < dim; d += PANEL) store(out + d, load(out + d) * all(before));
    *most = now;
  }
  *sum += lorax::sum(total);
}

// Up to QUERY_ROWS rows of a prompt and one kv head, for all query heads of the group.
// q and out are the first row's; `first` its position; keys and values the sequence's, from 0.
template <class E>
void attend_prompt(const typename E::T* q, long q_width, const typename E::T* keys,
                   const typename E::T* values, int rows, int group, int dim, int first,
                   float scale, const Scratch<E>& s, typename E::T* out, long out_width) {
  const int count = rows * group, length = first + rows;
  for (int m = 0; m < count; m++)
    to_row<E>(q + (m / group) * q_width + (m % group) * dim, dim, s.queries + long(m) * dim);
  std::fill(s.out, s.out + long(count) * dim, 0.0f);
  std::fill(s.most, s.most + count, -INFINITY);
  std::fill(s.sum, s.sum + count, 0.0f);
  float scores[TILE * KEYS], c[TILE * PAIR];
  for (int begin = 0; begin < length; begin += KEYS) {
    const int valid = std::min(KEYS, length - begin);
    pack_keys<E>(keys + long(begin) * dim, dim, valid, s.keys);
    pack_values<E>(values + long(begin) * dim, dim, valid, s.values);
    for (int m = 0; m < count; m += TILE) {
      const int tall = std::min(TILE, count - m);
      if (first + (m + tall - 1) / group < begin) continue;  // all of the block is in its future
      for (int p = 0; p < valid; p += PAIR) {
        const typename E::T* panel = s.keys + long(p) * dim;
        tile_of<E>(tall, s.queries + long(m) * dim, dim, panel, panel + PANEL * dim,
                   dim / E::STEP, nullptr, 0, c);
        for (int i = 0; i < tall; i++)
          std::memcpy(scores + i * KEYS + p, c + i * PAIR, PAIR * sizeof(float));
      }
      for (int i = 0; i < tall; i++) {
        const int seen = std::min(valid, first + (m + i) / group - begin + 1);
        if (seen > 0)
          weigh_scores<E>(scores + i * KEYS, seen, scale, s.most + m + i, s.sum + m + i,
                          s.out + long(m + i) * dim, dim, s.weights + i * KEYS);
        else
          std::fill(s.weights + i * KEYS, s.weights + (i + 1) * KEYS, typename E::Row(0));
      }
      for (int d = 0; d < dim; d += PAIR) {
        const bool whole = d + PANEL < dim;
        const typename E::T* panel = s.values + long(d) * KEYS;
        tile_of<E>(tall, s.weights, KEYS, panel, whole ? panel + PANEL * KEYS : panel,
                   (valid + E::STEP - 1) / E::STEP, nullptr, 0, c);
        for (int i = 0; i < tall; i++)
          for (int half = 0; half < (whole ? 2 : 1); half++) {
            float* o = s.out + long(m + i) * dim + d + half * PANEL;
            store(o, load(o) + load(c + i * PAIR + half * PANEL));
          }
      }
    }
  }
  for (int m = 0; m < count; m++) {
    const V norm = all(1.0f / s.sum[m]);
    typename E::T* row = out + (m / group) * out_width + (m % group) * dim;
    for (int d = 0; d < dim; d += PANEL)
      E::narrow(row + d, load(s.out + long(m) * dim + d) * norm);
  }
}

// Run by every thread of a team. out [rows, heads * head_dim]. scratch: Scratch::floats a thread.
template <class E>
void attend(const Attention& a, const Rows& rows, typename E::T* qkv, typename E::T* keys,
            typename E::T* values, typename E::T* out, float* scratch) {
  using T = typename E::T;
  const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const int dim = a.head_dim, group = a.heads / a.kv_heads;
  const long width = long(a.heads + 2 * a.kv_heads) * dim, out_width = long(a.heads) * dim;
  const long head_size = long(a.max_length) * dim;
  for (int r = thread; r < rows.num_rows; r += threads) {
    T* row = qkv + r * width;
    const int position = rows.position[r];
    const float* cos = a.cos + long(position) * (dim / 2);
    const float* sin = a.sin + long(position) * (dim / 2);
    for (int h = 0; h < a.heads + a.kv_heads; h++) {
      const void* norm = h < a.heads ? a.q_norm : a.k_norm;
      if (norm) rms_norm_row<E>(row + h * dim, (const T*)norm, a.eps, dim, row + h * dim);
      rotate<E>(row + h * dim, dim, cos, sin);
    }
    for (int h = 0; h < a.kv_heads; h++) {
      const long at = (long(rows.kv_slot[r]) * a.kv_heads + h) * head_size + long(position) * dim;
      std::memcpy(keys + at, row + (a.heads + h) * dim, dim * sizeof(T));
      std::memcpy(values + at, row + (a.heads + a.kv_heads + h) * dim, dim * sizeof(T));
    }
  }
  // A sequence attends to its own cache row only, but another thread may have written it.
#pragma omp barrier
  const Scratch<E> own(scratch + thread * Scratch<E>::floats(group, dim, a.max_length), group, dim,
                       a.max_length);
  const auto cached = [&](int row, int h) {
    return (long(rows.kv_slot[row]) * a.kv_heads + h) * head_size;
  };
  for (int p = 0; p < rows.num_prompts; p++) {  // the longest tasks first
    const Prompt& prompt = rows.prompts[p];
    const int blocks = (prompt.end - prompt.start + QUERY_ROWS - 1) / QUERY_ROWS;
#pragma omp for schedule(dynamic, 1) nowait
    for (int task = 0; task < blocks * a.kv_heads; task++) {
      const int h = task % a.kv_heads;
      const int r = prompt.start + (blocks - 1 - task / a.kv_heads) * QUERY_ROWS;
      const int count = std::min(QUERY_ROWS, prompt.end - r);
      const long at = cached(r, h);
      const T* q = qkv + r * width + h * group * dim;
      T* to = out + r * out_width + h * group * dim;
      if (rows.by_rows)
        attend_rows<E>(q, width, keys + at, values + at, count, group, dim, rows.position[r],
                       a.scale, own.scores, own.ld, to, out_width);
      else
        attend_prompt<E>(q, width, keys + at, values + at, count, group, dim, rows.position[r],
                         a.scale, own, to, out_width);
    }
  }
#pragma omp for schedule(dynamic, 1) nowait
  for (int task = 0; task < rows.num_decodes * a.kv_heads; task++) {
    const int r = task / a.kv_heads, h = task % a.kv_heads;
    const long at = cached(r, h);
    attend_rows<E>(qkv + r * width + h * group * dim, width, keys + at, values + at, 1, group, dim,
                   rows.position[r], a.scale, own.scores, own.ld,
                   out + r * out_width + h * group * dim, out_width);
  }
}

}  // namespace lorax
