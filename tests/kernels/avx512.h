// The AVX-512 intrinsics that rows_avx512.cc uses, written out for a processor without them (tests only).
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

struct Floats16 {
  float at[16];
};
struct Words16 {
  uint32_t at[16];
};

#define EACH(result, expression)                  \
  {                                               \
    result r;                                     \
    for (int i = 0; i < 16; ++i) r.at[i] = expression; \
    return r;                                     \
  }

inline Floats16 em_load(const void* p) {
  Floats16 r;
  std::memcpy(r.at, p, 64);
  return r;
}
inline void em_store(void* p, Floats16 a) { std::memcpy(p, a.at, 64); }
inline Floats16 em_set(float a) EACH(Floats16, a)
inline Floats16 em_add(Floats16 a, Floats16 b) EACH(Floats16, a.at[i] + b.at[i])
inline Floats16 em_sub(Floats16 a, Floats16 b) EACH(Floats16, a.at[i] - b.at[i])
inline Floats16 em_mul(Floats16 a, Floats16 b) EACH(Floats16, a.at[i] * b.at[i])
inline Floats16 em_fma(Floats16 a, Floats16 b, Floats16 c) EACH(Floats16, std::fma(a.at[i], b.at[i], c.at[i]))
inline float em_sum(Floats16 a) {
  float s = 0;
  for (float x : a.at) s += x;
  return s;
}
template <class... T>
inline Words16 em_words(T... given) {
  return {{uint32_t(given)...}};
}
inline Words16 em_shift(Words16 a, Words16 by) EACH(Words16, by.at[i] > 31 ? 0 : a.at[i] >> by.at[i])
inline Words16 em_pairs(long long v) EACH(Words16, uint32_t(uint64_t(v) >> (i % 2 ? 32 : 0)))
inline Floats16 em_look_up(Words16 index, Floats16 table) EACH(Floats16, table.at[index.at[i] & 15])
inline Words16 em_widen(__m128i a) {
  int8_t bytes[16];
  std::memcpy(bytes, &a, 16);
  EACH(Words16, uint32_t(int32_t(bytes[i])))
}
inline Floats16 em_float(Words16 a) EACH(Floats16, float(int32_t(a.at[i])))
inline Floats16 em_halves(__m256i a) {
  Floats16 r;
  _mm256_storeu_ps(r.at, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
  _mm256_storeu_ps(r.at + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
  return r;
}

#define __m512 Floats16
#define __m512i Words16
#define _mm512_loadu_ps em_load
#define _mm512_storeu_ps em_store
#define _mm512_set1_ps em_set
#define _mm512_setzero_ps() em_set(0.0f)
#define _mm512_add_ps em_add
#define _mm512_sub_ps em_sub
#define _mm512_mul_ps em_mul
#define _mm512_fmadd_ps em_fma
#define _mm512_reduce_add_ps em_sum
#define _mm512_setr_epi32 em_words
#define _mm512_srlv_epi32 em_shift
#define _mm512_set1_epi64 em_pairs
#define _mm512_permutexvar_ps em_look_up
#define _mm512_cvtepi8_epi32 em_widen
#define _mm512_cvtepi32_ps em_float
#define _mm512_cvtph_ps em_halves
