// Rows of codes with AVX-512F (and AVX2, F16C). Compiled with those flags; called only where the processor has them.
#include <immintrin.h>

#include "rows.h"

namespace jqopt {
namespace {

struct V {
  static constexpr int kLanes = 16;
  __m512 v;
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
  static V set(float a) { return {_mm512_set1_ps(a)}; }
  static V zero() { return {_mm512_setzero_ps()}; }
  static V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
  static V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static float sum(V a) { return _mm512_reduce_add_ps(a.v); }

  struct Coded {
    static constexpr int kVectors = 4, kShared = 1;
    static V along(const float* four, int c) { return set(four[c]); }
  };

  // Eight bytes are 16 codes: broadcast, shifted by 0, 4 ... 28 bits in pairs of lanes, and looked up by the low four
  // bits of a lane.
  struct Nibble : Coded {
    static constexpr bool kIntegers = true;
    static constexpr int64_t bytes = 32;
    static constexpr float unit = 1.0f;
    __m512 table;
    explicit Nibble(int64_t element) {
      alignas(64) float values[16];
      for (uint32_t code = 0; code < 16; ++code) values[code] = value_of(element, code);
      table = _mm512_loadu_ps(values);
    }
    void group(const uint8_t* p, V* w) const {
      const __m512i shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
      for (int i = 0; i < kVectors; ++i) {
        long long eight;
        std::memcpy(&eight, p + 8 * i, 8);
        w[i].v = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(eight), shifts), table);
      }
    }
  };

  struct Int8 : Coded {
    static constexpr bool kIntegers = true;
    static constexpr int64_t bytes = 64;
    static constexpr float unit = 1.0f;
    explicit Int8(int64_t = 0) {}
    void group(const uint8_t* p, V* w) const {
      for (int i = 0; i < kVectors; ++i) {
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i));
        w[i].v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(c));
      }
    }
  };

  // Placed in the bits of float16, whose conversion keeps subnormals whatever the processor does with float32's.
  struct E4M3 : Coded {
    static constexpr bool kIntegers = false;
    static constexpr int64_t bytes = 64;
    static constexpr float unit = 256.0f;
    explicit E4M3(int64_t = 0) {}
    void group(const uint8_t* p, V* w) const {
      const __m256i rest = _mm256_set1_epi16(0x3f80), sign = _mm256_set1_epi16(int16_t(0x8000));
      for (int i = 0; i < kVectors; ++i) {
        const __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
        const __m256i value = _mm256_and_si256(_mm256_slli_epi16(c, 7), rest);
        const __m256i nan = _mm256_cmpeq_epi16(value, rest);
        const __m256i top = _mm256_and_si256(_mm256_slli_epi16(c, 8), sign);
        w[i].v = _mm512_cvtph_ps(_mm256_or_si256(_mm256_or_si256(value, nan), top));
      }
    }
  };

  struct E5M2 : Coded {
    static constexpr bool kIntegers = false;
    static constexpr int64_t bytes = 64;
    static constexpr float unit = 1.0f;
    explicit E5M2(int64_t = 0) {}
    void group(const uint8_t* p, V* w) const {
      for (int i = 0; i < kVectors; ++i) {
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i));
        w[i].v = _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(c), 8));
      }
    }
  };
};

void order(int64_t element, int* columns) {
  for (int i = 0; i < kGroup; ++i) {
    const int vector = i / 16, lane = i % 16;
    columns[i] = is_nibble(element) ? 16 * vector + 8 * (lane % 2) + lane / 2 : i;
  }
}

}  // namespace

const Isa kAvx512 = {"avx512", order, Scratch<V>::size, run<V>};

}  // namespace jqopt
