// What the handler hands to the code of each instruction set: one product, and what an element's code stands for.
#pragma once
#include <cstdint>

namespace jqopt {

// As in ffi_gemm.py.
enum Element : int64_t { kE2M1 = 0, kInt4 = 1, kUint4 = 2, kInt8 = 3, kE4M3 = 4, kE5M2 = 5 };
enum Scale : int64_t { kNone = 0, kF32 = 1, kBitsE4M3 = 2, kBitsE8M0 = 3 };

// Columns are handled in groups of 64; scales and zero points are spread to one for each 16 columns before.
constexpr int64_t kGroup = 64;
constexpr int64_t kPerScale = 16;

struct Product {
  int64_t m, n, k;
  int64_t padded;         // k, rounded up to whole groups
  const float* x;         // [m, padded]: columns of each group in this instruction set's order, zero from k on
  const uint8_t* codes;   // [n, width]; of each row the first `used` bytes are read
  int64_t width, used;
  int64_t element;        // Element
  const void* scale;      // [ceil(n/rows), columns] of `kind`, or null
  int64_t kind;           // Scale
  const float* zero;      // the same shape, or null
  int64_t rows, block;              // of w that share a scale
  int64_t scale_width, zero_width;  // stored in a row
  float* y;               // [m, n]
};

// One instruction set. `order`: for each place of a group the column it holds. `run`: rows [first, last) of w, with
// `scratch` floats of its own, of which it needs `scratch_size`.
struct Isa {
  const char* name;
  void (*order)(int64_t element, int* columns);
  int64_t (*scratch_size)(const Product&);
  void (*run)(const Product&, int64_t first, int64_t last, float* scratch);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

// The value of a code, exactly. 4-bit elements read the low nibble.
inline float bits_to_float(uint32_t bits) {
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

inline float small_float(uint32_t code, int exponent_bits, int mantissa_bits, int bias) {
  const uint32_t mantissa = code & ((1u << mantissa_bits) - 1);
  const uint32_t exponent = (code >> mantissa_bits) & ((1u << exponent_bits) - 1);
  const float sign = (code >> (mantissa_bits + exponent_bits)) & 1 ? -1.0f : 1.0f;
  const float significand = mantissa + (exponent ? float(1u << mantissa_bits) : 0.0f);
  const int power = int(exponent ? exponent : 1) - bias - mantissa_bits;  // of normal floats, here
  return sign * significand * bits_to_float(uint32_t(127 + power) << 23);
}

inline float value_of(int64_t element, uint32_t code) {
  const float nan = bits_to_float(0x7fc00000u), inf = bits_to_float(0x7f800000u);
  switch (element) {
    case kE2M1: return small_float(code & 15, 2, 1, 1);
    case kInt4: return float(int((code & 15) ^ 8) - 8);
    case kUint4: return float(code & 15);
    case kInt8: return float(int8_t(uint8_t(code)));
    case kE4M3: return (code & 0x7f) == 0x7f ? nan : small_float(code & 0xff, 4, 3, 7);
    case kE5M2:
      if ((code & 0x7c) == 0x7c) return (code & 3) ? nan : (code & 0x80 ? -inf : inf);
      return small_float(code & 0xff, 5, 2, 15);
  }
  return nan;
}

inline bool is_nibble(int64_t element) { return element <= kUint4; }
inline int64_t code_bytes(int64_t element, int64_t columns) { return is_nibble(element) ? (columns + 1) / 2 : columns; }

}  // namespace jqopt
