// Rows of codes with AVX2, FMA and F16C. Compiled with those flags; called only where the processor has them.
#include <immintrin.h>

#include "rows.h"

namespace jqopt {
namespace {

struct V {
  static constexpr int kLanes = 8;
  __m256 v;
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
  static V set(float a) { return {_mm256_set1_ps(a)}; }
  static V zero() { return {_mm256_setzero_ps()}; }
  static V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
  static V sub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static float sum(V a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // 4-bit codes whose values are bfloat16 numbers: two byte look-ups give both bytes of 32 values, interleaving them
  // gives bfloat16 pairs, and a shift or a mask a float32. Vectors 0 to 3 hold columns 0..15 and 32..47 of the group,
  // 4 to 7 the others.
  struct Nibble {
    static constexpr bool kIntegers = true;
    static constexpr int kVectors = 8, kShared = 4;
    static constexpr int64_t bytes = 32;
    static constexpr float unit = 1.0f;
    __m256i high, low;

    explicit Nibble(int64_t element) {
      alignas(32) uint8_t top[32], next[32];
      for (uint32_t code = 0; code < 32; ++code) {
        const float value = value_of(element, code & 15);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        top[code] = uint8_t(bits >> 24), next[code] = uint8_t(bits >> 16);
      }
      high = _mm256_load_si256(reinterpret_cast<const __m256i*>(top));
      low = _mm256_load_si256(reinterpret_cast<const __m256i*>(next));
    }

    static void pair(__m256i words, V* w) {
      w[0].v = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
      w[1].v = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000))));
    }

    void group(const uint8_t* p, V* w) const {
      const __m256i mask = _mm256_set1_epi8(15);
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      const __m256i even = _mm256_and_si256(both, mask), odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
      const __m256i even_low = _mm256_shuffle_epi8(low, even), even_high = _mm256_shuffle_epi8(high, even);
      const __m256i odd_low = _mm256_shuffle_epi8(low, odd), odd_high = _mm256_shuffle_epi8(high, odd);
      pair(_mm256_unpacklo_epi8(even_low, even_high), w);
      pair(_mm256_unpacklo_epi8(odd_low, odd_high), w + 2);
      pair(_mm256_unpackhi_epi8(even_low, even_high), w + 4);
      pair(_mm256_unpackhi_epi8(odd_low, odd_high), w + 6);
    }

    static V along(const float* four, int c) {
      const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
      return {_mm256_permutevar_ps(all, _mm256_setr_epi32(c, c, c, c, c + 2, c + 2, c + 2, c + 2))};
    }
  };

  struct Byte {
    static constexpr int kVectors = 8, kShared = 2;
    static constexpr int64_t bytes = 64;
    static V along(const float* four, int c) { return {_mm256_broadcast_ss(four + c)}; }
  };

  struct Int8 : Byte {
    static constexpr bool kIntegers = true;
    static constexpr float unit = 1.0f;
    explicit Int8(int64_t = 0) {}
    void group(const uint8_t* p, V* w) const {
      for (int i = 0; i < kVectors; ++i) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
        w[i].v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
      }
    }
  };

  static void halves(__m256i bits, V* w) {
    w[0].v = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
    w[1].v = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
  }

  // Placed in the bits of float16, whose conversion keeps subnormals whatever the processor does with float32's.
  struct E4M3 : Byte {
    static constexpr bool kIntegers = false;
    static constexpr float unit = 256.0f;
    explicit E4M3(int64_t = 0) {}
    void group(const uint8_t* p, V* w) const {
      const __m256i rest = _mm256_set1_epi16(0x3f80), sign = _mm256_set1_epi16(int16_t(0x8000));
      for (int i = 0; i < kVectors; i += 2) {
        const __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
        const __m256i value = _mm256_and_si256(_mm256_slli_epi16(c, 7), rest);
        const __m256i nan = _mm256_cmpeq_epi16(value, rest);
        halves(_mm256_or_si256(_mm256_or_si256(value, nan), _mm256_and_si256(_mm256_slli_epi16(c, 8), sign)), w + i);
      }
    }
  };

  struct E5M2 : Byte {
    static constexpr bool kIntegers = false;
    static constexpr float unit = 1.0f;
    explicit E5M2(int64_t = 0) {}
    void group(const uint8_t* p, V* w) const {
      for (int i = 0; i < kVectors; i += 2) {
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
        halves(_mm256_slli_epi16(_mm256_cvtepu8_epi16(c), 8), w + i);
      }
    }
  };
};

void order(int64_t element, int* columns) {
  static const int within[4] = {0, 2, 1, 3};
  for (int i = 0; i < kGroup; ++i) {
    const int vector = i / 8, lane = i % 8;
    const int nibbles = 32 * (lane / 4) + 16 * (vector / 4) + 4 * (lane % 4) + within[vector % 4];
    columns[i] = is_nibble(element) ? nibbles : i;
  }
}

}  // namespace

const Isa kAvx2 = {"avx2", order, Scratch<V>::size, run<V>};

}  // namespace jqopt
