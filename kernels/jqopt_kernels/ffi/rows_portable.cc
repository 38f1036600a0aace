// Rows of codes in C++ that any processor runs: values are looked up in tables, vectors are the compiler's.
#include "rows.h"

namespace jqopt {
namespace {

typedef float Four __attribute__((vector_size(16)));

struct Table {
  float values[256];
  explicit Table(int64_t element) {
    for (uint32_t code = 0; code < 256; ++code) values[code] = value_of(element, code);
  }
};

struct V {
  static constexpr int kLanes = 4;
  Four v;
  static V load(const float* p) { V out; std::memcpy(&out.v, p, 16); return out; }
  static void store(float* p, V a) { std::memcpy(p, &a.v, 16); }
  static V set(float a) { return {Four{a, a, a, a}}; }
  static V zero() { return set(0.0f); }
  static V add(V a, V b) { return {a.v + b.v}; }
  static V sub(V a, V b) { return {a.v - b.v}; }
  static V mul(V a, V b) { return {a.v * b.v}; }
  static V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }
  static float sum(V a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

  struct Coded {
    static constexpr int kVectors = 16, kShared = 4;
    static constexpr float unit = 1.0f;
    static V along(const float* four, int c) { return set(four[c]); }
  };

  struct Nibble : Coded {
    static constexpr bool kIntegers = true;
    static constexpr int64_t bytes = 32;
    Table table;
    explicit Nibble(int64_t element) : table(element) {}
    void group(const uint8_t* p, V* w) const {
      const float* t = table.values;
      for (int i = 0; i < kVectors; ++i, p += 2) w[i] = {Four{t[p[0] & 15], t[p[0] >> 4], t[p[1] & 15], t[p[1] >> 4]}};
    }
  };

  struct Byte : Coded {
    static constexpr int64_t bytes = 64;
    const Table& table;
    explicit Byte(const Table& t) : table(t) {}
    void group(const uint8_t* p, V* w) const {
      const float* t = table.values;
      for (int i = 0; i < kVectors; ++i, p += 4) w[i] = {Four{t[p[0]], t[p[1]], t[p[2]], t[p[3]]}};
    }
  };

  template <Element kElement>
  struct Of : Byte {
    static constexpr bool kIntegers = kElement == kInt8;
    static const Table& shared() { static const Table table(kElement); return table; }
    explicit Of(int64_t = 0) : Byte(shared()) {}
  };
  using Int8 = Of<kInt8>;
  using E4M3 = Of<kE4M3>;
  using E5M2 = Of<kE5M2>;
};

void order(int64_t, int* columns) {
  for (int i = 0; i < kGroup; ++i) columns[i] = i;
}

}  // namespace

const Isa kPortable = {"portable", order, Scratch<V>::size, run<V>};

}  // namespace jqopt
