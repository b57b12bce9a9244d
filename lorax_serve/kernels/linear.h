// y = x @ W.T, LoRA added unmerged, as one pass over packed weights.
//
// W [out, in] lies in panels of 16 outputs: [out / 16][in / STEP][16][STEP], so that a register
// holds one step of 16 outputs and the weights are read front to back, once per 256 rows of x.
// Two panels are computed at a time. A panel is 16 columns of y, with one exception: of a gated
// linear (gate and up one below the other), panel 2i is of gate and 2i + 1 of up, the same columns.
//
// LoRA: A [ranks, in] lies as it is; h = x @ A.T by dot products. B is in panels like W, scaled:
// [columns / 16][ranks / STEP][16][STEP], a rank that does not fill its last step has zeros there.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "vec.h"

namespace lorax {

constexpr int PANEL = 16;
constexpr int PAIR = 2 * PANEL;     // columns computed together
constexpr int BLOCK = 256;          // rows of x that one reading of the weights serves
constexpr int AHEAD = 2048;         // bytes that LoRA's streams are fetched ahead

struct Linear {
  const void* panels;
  const float* bias;   // [out], in the order of the panels, or null
  const void* norm;    // [in]: x is RMS-normalised and multiplied by it first; or null
  int32_t in, out;
  float eps;
};

enum Store : int32_t { WRITE = 0, ADD = 1, GATED = 2, WRITE_FLOAT = 3 };

struct LoraPart {       // one module's share of a fused site
  const void* b;
  int32_t first_rank, ranks;      // rows of A
  int32_t h_column;               // where its ranks begin in h, at a full step
  int32_t first_panel, panel_step, panels;
};

struct LoraSite {
  const void* a;
  LoraPart parts[3];
  int32_t num_parts;
  const float* gain;    // [out], in the order of the panels, or null: y = (x @ W.T + LoRA) * gain
  const float* shift;   // as gain: is added to y, which has its bias too
  const void* norm;     // [in], or null: takes the place of the linear's norm
};

struct Segment {        // rows of x that share an adapter
  const LoraSite* sites;
  const int32_t* rows;
  int32_t num_rows;
};

struct Lora {
  const Segment* segments;
  int32_t num_segments;
  int32_t h_width;      // columns of h
  void* h;              // [rows, h_width]
};

// sum[i] = the products of M rows of x and P panels over parts [FROM, FROM + N) of all steps. On the
// way, `stride` bytes a step from `ahead` on are fetched into the L2 cache: with few rows, the pass
// would otherwise wait for memory.
template <class E, int FROM, int N, int M, int P>
__attribute__((always_inline)) inline void products(const typename E::Row* x, long ldx,
                                                    const typename E::T* const* panels, int steps,
                                                    const char* ahead, int stride,
                                                    V (&sum)[N][M][P]) {
  for (int i = 0; i < N; i++)
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) sum[i][m][p] = zero();
  for (int k = 0; k < steps; k++) {
    if (stride > 0) _mm_prefetch(ahead + long(k) * stride, _MM_HINT_T1);
    if (stride > 64) _mm_prefetch(ahead + long(k) * stride + 64, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int i = 0; i < N; i++) {
      decltype(E::spread_part(x, FROM + i)) w[P];
      for (int p = 0; p < P; p++)
        w[p] = E::part(E::load(panels[p] + k * PANEL * E::STEP), FROM + i);
      for (int m = 0; m < M; m++) {
        const auto a = E::spread_part(x + m * ldx + k * E::STEP, FROM + i);
        for (int p = 0; p < P; p++) sum[i][m][p] = E::multiply_part(sum[i][m][p], a, w[p]);
      }
    }
  }
}

// M rows of x by two panels into c[M][PAIR]; `ahead` and `stride` as for `products`.
//
// Each part is summed on its own, whether few rows leave registers for all of them at once or not:
// a row's result is the same bits whatever rows are beside it.
template <class E, int M>
inline void tile(const typename E::Row* x, long ldx, const typename E::T* panel0,
                 const typename E::T* panel1, int steps, const char* ahead, int stride, float* c) {
  constexpr int P = TILE_PANELS, PARTS = E::PARTS;
  constexpr bool TOGETHER = PARTS == 1 || M <= 3;
  const typename E::T* const panels[2] = {panel0, panel1};
  for (int first = 0; first < 2; first += P) {
    V sum[TOGETHER ? PARTS : 1][M][P];
    const auto place = [&](int m, int p) { return c + m * PAIR + (first + p) * PANEL; };
    products<E, 0>(x, ldx, panels + first, steps, ahead, first ? 0 : stride, sum);
    if constexpr (!TOGETHER) {
      for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) store(place(m, p), sum[0][m][p]);
      products<E, 1>(x, ldx, panels + first, steps, ahead, 0, sum);
      for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) sum[0][m][p] = load(place(m, p)) + sum[0][m][p];
    } else if constexpr (PARTS == 2) {
      for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) sum[0][m][p] = sum[0][m][p] + sum[1][m][p];
    }
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) store(place(m, p), sum[0][m][p]);
  }
}

template <class E>
inline void tile_of(int m, const typename E::Row* x, long ldx, const typename E::T* panel0,
                    const typename E::T* panel1, int steps, const char* ahead, int stride,
                    float* c) {
  switch (m) {
    case 8: if constexpr (TILE >= 8) return tile<E, 8>(x, ldx, panel0, panel1, steps, ahead, stride, c);
    case 7: if constexpr (TILE >= 7) return tile<E, 7>(x, ldx, panel0, panel1, steps, ahead, stride, c);
    case 6: return tile<E, 6>(x, ldx, panel0, panel1, steps, ahead, stride, c);
    case 5: return tile<E, 5>(x, ldx, panel0, panel1, steps, ahead, stride, c);
    case 4: return tile<E, 4>(x, ldx, panel0, panel1, steps, ahead, stride, c);
    case 3: return tile<E, 3>(x, ldx, panel0, panel1, steps, ahead, stride, c);
    case 2: return tile<E, 2>(x, ldx, panel0, panel1, steps, ahead, stride, c);
    case 1: return tile<E, 1>(x, ldx, panel0, panel1, steps, ahead, stride, c);
  }
}

// R rows of h by one panel of B, each added to its c[16]; in the same order whatever R is.
template <class E, int R>
inline void expand_rows(const typename E::T* const* h, const typename E::T* panel, int steps,
                        float* const* c) {
  V acc[R];
  for (int r = 0; r < R; r++) acc[r] = load(c[r]);
  // The next pair's panel of the same part.
  const char* next = (const char*)(panel + 2 * steps * PANEL * E::STEP);
  for (int k = 0; k < steps; k++) {
    _mm_prefetch(next + 64 * k, _MM_HINT_T0);
    const auto b = E::load(panel + k * PANEL * E::STEP);
    for (int r = 0; r < R; r++) acc[r] = E::multiply(acc[r], E::spread(h[r] + k * E::STEP), b);
  }
  for (int r = 0; r < R; r++) store(c[r], acc[r]);
}

// Adds the LoRA of rows [first, last) in one panel to c[row - first][stride].
template <class E>
void expand(const Lora& lora, int site, int panel, int first, int last, float* c) {
  using T = typename E::T;
  const T* h = (const T*)lora.h;
  for (int s = 0; s < lora.num_segments; s++) {
    const Segment& segment = lora.segments[s];
    const LoraSite& adapter = segment.sites[site];
    for (int p = 0; p < adapter.num_parts; p++) {
      const LoraPart& part = adapter.parts[p];
      const int offset = panel - part.first_panel;
      if (offset < 0 || offset % part.panel_step) continue;
      const int index = offset / part.panel_step;
      if (index >= part.panels) continue;
      const int steps = (part.ranks + E::STEP - 1) / E::STEP;
      const T* b = (const T*)part.b + long(index) * steps * PANEL * E::STEP;
      const int32_t* begin = std::lower_bound(segment.rows, segment.rows + segment.num_rows, first);
      const int32_t* end = std::lower_bound(begin, segment.rows + segment.num_rows, last);
      while (begin < end) {
        const int count = std::min(4, int(end - begin));
        const T* hs[4];
        float* cs[4];
        for (int i = 0; i < count; i++, begin++) {
          hs[i] = h + long(*begin) * lora.h_width + part.h_column;
          cs[i] = c + long(*begin - first) * PAIR;
        }
        switch (count) {
          case 4: expand_rows<E, 4>(hs, b, steps, cs); break;
          case 3: expand_rows<E, 3>(hs, b, steps, cs); break;
          case 2: expand_rows<E, 2>(hs, b, steps, cs); break;
          case 1: expand_rows<E, 1>(hs, b, steps, cs); break;
        }
      }
    }
  }
}

// What else an adapter does to one panel of its rows in [first, last), after its LoRA.
inline void scale_and_shift(const Lora& lora, int site, int panel, int first, int last, float* c) {
  for (int s = 0; s < lora.num_segments; s++) {
    const Segment& segment = lora.segments[s];
    const LoraSite& adapter = segment.sites[site];
    if (!adapter.gain && !adapter.shift) continue;
    const V gain = adapter.gain ? load(adapter.gain + panel * PANEL) : all(1.0f);
    const V shift = adapter.shift ? load(adapter.shift + panel * PANEL) : zero();
    const int32_t* begin = std::lower_bound(segment.rows, segment.rows + segment.num_rows, first);
    const int32_t* end = std::lower_bound(begin, segment.rows + segment.num_rows, last);
    for (; begin < end; begin++) {
      float* row = c + long(*begin - first) * PAIR;
      store(row, fma(load(row), gain, shift));
    }
  }
}

// The norm's weight for a row: its adapter's own, or the base's.
inline const void* norm_of(int row, const Lora& lora, int site, const void* base) {
  for (int s = 0; s < lora.num_segments; s++) {
    const Segment& segment = lora.segments[s];
    const void* own = segment.sites[site].norm;
    if (own && std::binary_search(segment.rows, segment.rows + segment.num_rows, row)) return own;
  }
  return base;
}

inline bool own_norms(const Lora& lora, int site) {
  for (int s = 0; s < lora.num_segments; s++)
    if (lora.segments[s].sites[site].norm) return true;
  return false;
}

// Dot products of R rows of x with `ranks` <= 8 rows of A, which lie one behind the other, N of them
// at a time. Few at a time are read front to back and fetched ahead; many share what is loaded.
// Each product is summed in the same order whatever R and N are.
template <class E, int R, int N>
inline void dots(const typename E::T* const* x, const typename E::T* a, int in, int ranks,
                 float out[][8]) {
  V all_sums[R][8];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 8; i++) all_sums[r][i] = zero();
  int done = 0;
  const auto some = [&](auto count) {
    constexpr int C = decltype(count)::value;
    V sum[R][C];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < C; i++) sum[r][i] = zero();
    for (int k = 0; k < in; k += E::DOT) {
      typename E::Reg xs[R];
      for (int r = 0; r < R; r++) xs[r] = E::load(x[r] + k);
      for (int i = 0; i < C; i++) {
        const typename E::T* row = a + long(done + i) * in + k;
        if (N < 8) _mm_prefetch((const char*)row + AHEAD, _MM_HINT_T0);
        const auto w = E::load(row);
        for (int r = 0; r < R; r++) sum[r][i] = E::multiply(sum[r][i], xs[r], w);
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < C; i++) all_sums[r][done + i] = sum[r][i];
    done += C;
  };
  while (done + N <= ranks) some(std::integral_constant<int, N>());
  while (done < ranks) some(std::integral_constant<int, 1>());
  for (int r = 0; r < R; r++) sums(all_sums[r], out[r]);
}

// h of rows [first_row, last_row) of a segment and of up to 8 ranks of one part.
template <class E>
void shrink_block(const typename E::T* x, int in, const Segment& segment, int first_row,
                  int last_row, const typename E::T* a, int ranks, typename E::T* h,
                  int h_width) {
  const bool few = last_row - first_row <= 2;  // these wait for memory
  for (int r = first_row; r < last_row; r += 2) {
    const int rows = std::min(2, last_row - r);
    const typename E::T* xs[2] = {x + long(segment.rows[r]) * in,
                                  x + long(segment.rows[r + rows - 1]) * in};
    float out[2][8];
    if (rows == 2)
      few ? dots<E, 2, FEW_RANKS>(xs, a, in, ranks, out)
          : dots<E, 2, MANY_RANKS>(xs, a, in, ranks, out);
    else
      few ? dots<E, 1, FEW_RANKS>(xs, a, in, ranks, out)
          : dots<E, 1, MANY_RANKS>(xs, a, in, ranks, out);
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < ranks; j++)
        h[long(segment.rows[r + i]) * h_width + j] = E::from_float(out[i][j]);
  }
}

// Calls work(segment, part, first rank, first row) for every piece of 8 ranks by 32 rows.
template <class F>
void for_pieces(const Lora& lora, int site, F work) {
  for (int s = 0; s < lora.num_segments; s++) {
    const LoraSite& adapter = lora.segments[s].sites[site];
    for (int p = 0; p < adapter.num_parts; p++)
      for (int row = 0; row < lora.segments[s].num_rows; row += 32)
        for (int rank = 0; rank < adapter.parts[p].ranks; rank += 8)
          work(lora.segments[s], adapter.parts[p], rank, row);
  }
}

// h = x @ A.T of every segment; each thread takes pieces that follow each other.
template <class E>
void shrink(const typename E::T* x, int in, const Lora& lora, int site, int thread, int threads) {
  using T = typename E::T;
  long pieces = 0, piece = 0;
  for_pieces(lora, site, [&](const Segment&, const LoraPart&, int, int) { pieces++; });
  const long first = pieces * thread / threads, last = pieces * (thread + 1) / threads;
  for_pieces(lora, site, [&](const Segment& segment, const LoraPart& part, int rank, int row) {
    const long here = piece++;
    if (here < first || here >= last) return;
    const T* a = (const T*)segment.sites[site].a + long(part.first_rank + rank) * in;
    const int end = std::min(row + 32, segment.num_rows), ranks = std::min(8, part.ranks - rank);
    T* h = (T*)lora.h + part.h_column + rank;
    shrink_block<E>(x, in, segment, row, end, a, ranks, h, lora.h_width);
    if (ranks % E::STEP)  // the last step is filled with zero
      for (int r = row; r < end; r++)
        h[long(segment.rows[r]) * lora.h_width + ranks] = E::from_float(0);
  });
}

template <class E>
void rms_norm_row(const typename E::T* x, const typename E::T* weight, float eps, int n,
                  typename E::T* y) {
  V squares = zero();
  for (int i = 0; i < n; i += PANEL) {
    const V v = E::widen(x + i);
    squares = fma(v, v, squares);
  }
  const V scale = all(1.0f / std::sqrt(sum(squares) / n + eps));
  for (int i = 0; i < n; i += PANEL)
    E::narrow(y + i, E::widen(x + i) * scale * E::widen(weight + i));
}

// n elements as tiles take them.
template <class E>
inline void to_row(const typename E::T* x, int n, typename E::Row* row) {
  if constexpr (std::is_same_v<typename E::Row, typename E::T>)
    std::memcpy(row, x, n * sizeof(*row));
  else
    for (int i = 0; i < n; i += PANEL) store(row + i, E::widen(x + i));
}

// What a linear of `in` inputs works in, for each row of x.
template <class E>
constexpr long linear_scratch(int in) {
  constexpr bool same = std::is_same_v<typename E::Row, typename E::T>;
  return in * (sizeof(typename E::T) + (same ? 0 : sizeof(typename E::Row)));
}

// Writes rows [first, last) of two panels from c to y.
template <class E>
void put(const Linear& w, Store mode, int panel, bool whole, const float* c, int first, int last,
           void* y) {
  using T = typename E::T;
  const int width = mode == GATED ? w.out / 2 : w.out;
  for (int half = 0; half < (whole ? 2 : 1); half++) {
    const int column = (panel + half) * PANEL;
    const V bias = w.bias ? load(w.bias + column) : zero();
    if (mode == GATED) {
      const V up_bias = w.bias ? load(w.bias + column + PANEL) : zero();
      for (int r = first; r < last; r++) {
        const float* row = c + long(r - first) * PAIR;
        const V gate = load(row) + bias, up = load(row + PANEL) + up_bias;
        const V sigmoid = all(1.0f) / (all(1.0f) + exp(zero() - gate));
        E::narrow((T*)y + long(r) * width + column / 2, gate * sigmoid * up);
      }
      return;
    }
    for (int r = first; r < last; r++) {
      V v = load(c + long(r - first) * PAIR + half * PANEL) + bias;
      const long at = long(r) * width + column;
      if (mode == WRITE_FLOAT) {
        store((float*)y + at, v);
      } else {
        if (mode == ADD) v = v + E::widen((T*)y + at);
        E::narrow((T*)y + at, v);
      }
    }
  }
}

// The whole linear, run by every thread of a team. scratch: linear_scratch(in) bytes a row.
template <class E>
void linear(const Linear& w, Store mode, const typename E::T* x, int rows, void* y,
            const Lora* lora, int site, void* scratch) {
  using T = typename E::T;
  using Row = typename E::Row;
  constexpr bool same = std::is_same_v<Row, T>;
  const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
  T* normed = (T*)scratch;
  Row* wide = (Row*)(normed + long(rows) * w.in);
  const T* h = w.norm ? normed : x;
  const bool own = w.norm && lora && own_norms(*lora, site);
  for (int r = thread; r < rows && (w.norm || !same); r += threads) {
    const long at = long(r) * w.in;
    if (w.norm) {
      const void* norm = own ? norm_of(r, *lora, site, w.norm) : w.norm;
      rms_norm_row<E>(x + at, (const T*)norm, w.eps, w.in, normed + at);
    }
    if constexpr (!same) to_row<E>(h + at, w.in, wide + at);
  }
  if (w.norm || !same) {
#pragma omp barrier
  }
  x = h;
  if constexpr (same) wide = (Row*)x;
  if (lora) {
    shrink<E>(x, w.in, *lora, site, thread, threads);
#pragma omp barrier
  }
  const int steps = w.in / E::STEP;
  const long panel_size = long(w.in) * PANEL;
  const int panels = w.out / PANEL, pairs = (panels + 1) / 2;
  const int first_pair = long(pairs) * thread / threads;
  const int last_pair = long(pairs) * (thread + 1) / threads;
  alignas(64) float c[BLOCK * PAIR];
  for (int first = 0; first < rows; first += BLOCK) {
    const int last = std::min(first + BLOCK, rows);
    const int tiles = (last - first + TILE - 1) / TILE;
    // The next pair of panels is fetched while this one is computed, its lines dealt out to tiles.
    const int stride = 2 * 64 / tiles;
    for (int pair = first_pair; pair < last_pair; pair++) {
      const int panel = 2 * pair;
      const bool whole = panel + 1 < panels;
      const T* panel0 = (const T*)w.panels + panel * panel_size;
      const T* panel1 = whole ? panel0 + panel_size : panel0;
      const char* next = (const char*)(panel1 + panel_size);
      for (int t = 0; t < tiles; t++) {  // tiles of nearly equal height
        const int begin = first + (last - first) * t / tiles;
        const int end = first + (last - first) * (t + 1) / tiles;
        tile_of<E>(end - begin, wide + long(begin) * w.in, w.in, panel0, panel1, steps,
                   next + long(t) * steps * stride, stride, c + long(begin - first) * PAIR);
      }
      if (lora) {
        expand<E>(*lora, site, panel, first, last, c);
        if (whole) expand<E>(*lora, site, panel + 1, first, last, c + PANEL);
        scale_and_shift(*lora, site, panel, first, last, c);
        if (whole) scale_and_shift(*lora, site, panel + 1, first, last, c + PANEL);
      }
      put<E>(w, mode, panel, whole, c, first, last, y);
    }
  }
}

}  // namespace lorax
