// The C interface: every function runs one op with a team of `threads`.
#include "attention.h"
#include "linear.h"
#include "sampling.h"

using namespace lorax;

#define LORAX_OPS(NAME, E)                                                                        \
  void lorax_linear_##NAME(const Linear* w, int32_t mode, const void* x, int32_t rows, void* y,   \
                           const Lora* lora, int32_t site, void* scratch, int32_t threads) {      \
    _Pragma("omp parallel num_threads(threads)")                                                  \
    linear<E>(*w, (Store)mode, (const E::T*)x, rows, y, lora, site, scratch);                     \
  }                                                                                               \
  int64_t lorax_linear_scratch_##NAME(int32_t in) { return linear_scratch<E>(in); }               \
  void lorax_attend_##NAME(const Attention* a, const Rows* rows, void* qkv, void* keys,           \
                           void* values, void* out, float* scratch, int32_t threads) {            \
    _Pragma("omp parallel num_threads(threads)")                                                  \
    attend<E>(*a, *rows, (E::T*)qkv, (E::T*)keys, (E::T*)values, (E::T*)out, scratch);            \
  }                                                                                               \
  int64_t lorax_attend_scratch_##NAME(int32_t group, int32_t head_dim, int32_t max_length) {      \
    return Scratch<E>::floats(group, head_dim, max_length);                                       \
  }

extern "C" {
LORAX_OPS(f32, F32)
LORAX_OPS(bf16, BF16)

void lorax_most_probable(const float* logits, int32_t rows, int32_t vocab, int32_t* tokens,
                         int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int r = 0; r < rows; r++) tokens[r] = most_probable(logits + long(r) * vocab, vocab);
}

// scratch: for each thread, vocab floats; sums: for each thread, two doubles a chunk of CHUNK.
void lorax_draw(const float* logits, int32_t rows, int32_t vocab, const int32_t* row_of,
                const float* temperature, const double* top_p, const uint64_t* seed,
                const uint64_t* position, float* scratch, double* sums, int32_t* tokens,
                int32_t threads) {
  const long chunks = (vocab + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int r = 0; r < rows; r++) {
    const int t = omp_get_thread_num();
    tokens[r] = draw(logits + long(row_of[r]) * vocab, vocab, temperature[r], top_p[r], seed[r],
                     position[r], scratch + t * long(vocab), sums + t * 2 * chunks);
  }
}
}
