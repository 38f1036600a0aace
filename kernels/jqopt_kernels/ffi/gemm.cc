// The handler XLA calls: x [*batch, m, k] times packed weights [*batch, n, k], transposed -> y [*batch, m, n].
//
// Nothing is read before every size has been checked: a mistake in a shape is an error, not a crash.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gemm.h"
#include "xla/ffi/api/ffi.h"

namespace jqopt {
namespace {

namespace ffi = xla::ffi;
using Dims = ffi::AnyBuffer::Dimensions;

std::vector<const Isa*> instruction_sets() {
  std::vector<const Isa*> out = {&kPortable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f")) out.push_back(&kAvx512);
  }
#endif
  return out;
}

const std::vector<const Isa*>& isas() {
  static const std::vector<const Isa*> known = instruction_sets();
  return known;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

Floats floats(int64_t count) {
  return Floats(static_cast<float*>(std::aligned_alloc(64, (count * int64_t(sizeof(float)) + 127) / 64 * 64)));
}

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("jqopt gemm: " + what); }

std::string show(const Dims& dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

// Work that whoever has time claims piece by piece. The caller works too and waits only for pieces that another thread
// has begun, so that a pool whose threads are all busy cannot block it.
struct Work {
  std::atomic<int64_t> next{0};
  int64_t count = 0, done = 0;
  bool failed = false;
  std::mutex mutex;
  std::condition_variable finished;

  template <class F>
  void help(const F& piece) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      const bool ok = piece(i);
      std::lock_guard<std::mutex> lock(mutex);
      failed |= !ok;
      if (++done == count) finished.notify_all();
    }
  }

  bool wait() {
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done == count; });
    return !failed;
  }
};

template <class F>
bool in_parallel(ffi::ThreadPool& pool, int64_t count, const F& piece) {
  auto work = std::make_shared<Work>();
  work->count = count;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  // a helper that comes too late finds nothing to claim, and touches nothing but `work`
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work, &piece] { work->help(piece); });
  work->help(piece);
  return work->wait();
}

// x as the instruction set wants it: columns in its order, whole groups.
void arrange(const Isa& isa, const Product& p, const float* x, float* out) {
  int order[kGroup];
  isa.order(p.element, order);
  for (int64_t row = 0; row < p.m; ++row)
    for (int64_t g = 0; g < p.padded; g += kGroup)
      for (int64_t i = 0; i < kGroup; ++i) {
        const int64_t column = g + order[i];
        out[row * p.padded + g + i] = column < p.k ? x[row * p.k + column] : 0.0f;
      }
}

constexpr int64_t kPieceBytes = 1 << 16;  // of codes in one piece of work, about
constexpr int64_t kPieceRows = 4;         // a piece is whole tiles of rows

bool multiply(ffi::ThreadPool& pool, const Isa& isa, Product p, const float* x) {
  const Floats arranged = floats(p.m * p.padded);
  if (!arranged) return false;
  arrange(isa, p, x, arranged.get());
  p.x = arranged.get();
  const int64_t fitting = kPieceBytes / std::max<int64_t>(p.used, 1) / kPieceRows * kPieceRows;
  const int64_t rows = std::max(kPieceRows, fitting);
  return in_parallel(pool, (p.n + rows - 1) / rows, [&](int64_t piece) {
    const Floats scratch = floats(isa.scratch_size(p));
    if (!scratch) return false;
    isa.run(p, piece * rows, std::min(p.n, (piece + 1) * rows), scratch.get());
    return true;
  });
}

// ---- operands with leading axes

// The matrix of batch entry `index` (of the result's leading axes): axes of length one serve every entry.
int64_t matrix_of(const Dims& dims, const Dims& out, int64_t index) {
  int64_t at = 0, stride = 1;
  for (int64_t axis = int64_t(out.size()) - 3; axis >= 0; --axis) {
    const int64_t i = index % out[axis];
    index /= out[axis];
    if (dims[axis] != 1) at += i * stride;
    stride *= dims[axis];
  }
  return at;
}

bool leading_fit(const Dims& dims, const Dims& out) {
  if (dims.size() != out.size()) return false;
  for (size_t axis = 0; axis + 2 < out.size(); ++axis)
    if (dims[axis] != out[axis] && dims[axis] != 1) return false;
  return true;
}

struct Sizes {
  int64_t element, kind, rows, block, k;
};

std::string matrix(int64_t rows, int64_t columns) {
  return "[..., " + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

int64_t last(const ffi::AnyBuffer& b, int i) { return b.dimensions()[b.dimensions().size() - i]; }

// Scales or zero points: float32, or bytes where `kind` says so, as many as the blocks of w.
std::string check_blocks(const char* name, const ffi::AnyBuffer& b, const Sizes& s, int64_t kind, int64_t n) {
  if (b.element_type() != (kind == kF32 ? ffi::F32 : ffi::U8)) return std::string(name) + " of an unexpected type";
  if (s.rows < 1 || s.block < kPerScale || s.block % kPerScale || s.block > int64_t(1) << 40)
    return "found a block of " + matrix(s.rows, s.block) + ", expected a multiple of 16 columns";
  const int64_t rows = (n + s.rows - 1) / s.rows, columns = (s.k + s.block - 1) / s.block;
  if (last(b, 2) < rows || last(b, 1) < columns)
    return std::string(name) + " " + show(b.dimensions()) + ", expected " + matrix(rows, columns);
  return "";
}

// What is wrong with the operands; empty: nothing.
std::string check(const Sizes& s, const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scale, const ffi::AnyBuffer& zero,
                  const Dims& x, const Dims& out) {
  if (s.element < kE2M1 || s.element > kE5M2) return "element " + std::to_string(s.element) + " is unknown";
  if (s.kind < kNone || s.kind > kBitsE8M0) return "kind of scale " + std::to_string(s.kind) + " is unknown";
  if (out.size() < 2) return "expected matrices, found a result " + show(out);
  for (const Dims& dims : {x, codes.dimensions(), scale.dimensions(), zero.dimensions()})
    if (!leading_fit(dims, out)) return "leading axes of " + show(dims) + ", expected those of " + show(out);
  if (codes.element_type() != ffi::U8 && codes.element_type() != ffi::S8) return "codes of an unexpected type";
  const int64_t n = out[out.size() - 1], m = out[out.size() - 2], bytes = s.k < 0 ? 0 : code_bytes(s.element, s.k);
  if (s.k < 0 || x[x.size() - 2] != m || x[x.size() - 1] != s.k)
    return "left operand " + show(x) + ", expected " + matrix(m, s.k);
  if (last(codes, 2) != n || last(codes, 1) < bytes)
    return "codes " + show(codes.dimensions()) + ", expected " + matrix(n, bytes) + " for k=" + std::to_string(s.k);
  std::string why = s.kind == kNone ? "" : check_blocks("scales", scale, s, s.kind, n);
  if (why.empty() && zero.element_count() && (s.kind == kNone || s.element >= kE4M3))
    return "zero points, which only integers with scales have";
  if (why.empty() && zero.element_count()) why = check_blocks("zero points", zero, s, kF32, n);
  return why;
}

ffi::Error Gemm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer scale,
                ffi::AnyBuffer zero, ffi::ResultBuffer<ffi::F32> y, int64_t element, int64_t kind, int64_t rows,
                int64_t block, int64_t isa) {
  const Dims out = y->dimensions(), xs = x.dimensions();
  const Sizes sizes = {element, kind, rows, block, xs.size() ? int64_t(xs[xs.size() - 1]) : -1};
  const std::string why = check(sizes, codes, scale, zero, xs, out);
  if (!why.empty()) return wrong(why);
  if (isa >= int64_t(isas().size())) return wrong("this processor lacks instruction set " + std::to_string(isa));
  const Isa& chosen = isa < 0 ? *isas().back() : *isas()[isa];
  const int64_t m = out[out.size() - 2], n = out[out.size() - 1], k = sizes.k;
  if (y->element_count() == 0) return ffi::Error::Success();
  const bool zeros = zero.element_count() > 0;
  const int64_t width = last(codes, 1), scale_width = last(scale, 1), zero_width = last(zero, 1);
  const int64_t scale_bytes = kind == kF32 ? 4 : 1;
  for (int64_t i = 0; i < int64_t(y->element_count()) / (m * n); ++i) {
    const char* scales = static_cast<const char*>(scale.untyped_data());
    const float* points = static_cast<const float*>(zero.untyped_data());
    Product p = {};
    p.m = m, p.n = n, p.k = k, p.padded = (k + kGroup - 1) / kGroup * kGroup;
    p.codes = static_cast<const uint8_t*>(codes.untyped_data()) + matrix_of(codes.dimensions(), out, i) * n * width;
    p.width = width, p.used = code_bytes(element, k), p.element = element, p.kind = kind;
    p.rows = std::max<int64_t>(rows, 1), p.block = std::max(block, kPerScale);
    p.scale_width = scale_width, p.zero_width = zero_width;
    const int64_t at = matrix_of(scale.dimensions(), out, i) * last(scale, 2) * scale_width * scale_bytes;
    p.scale = kind == kNone ? nullptr : scales + at;
    p.zero = zeros ? points + matrix_of(zero.dimensions(), out, i) * last(zero, 2) * zero_width : nullptr;
    p.y = y->typed_data() + i * m * n;
    if (!multiply(pool, chosen, p, x.typed_data() + matrix_of(xs, out, i) * m * k))
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jqopt gemm: out of memory");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jqopt

extern "C" {

XLA_FFI_DEFINE_HANDLER_SYMBOL(JqoptGemm, jqopt::Gemm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("element")
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("block")
                                  .Attr<int64_t>("isa"));

// The instruction sets of this processor, the best last: the i-th name, or null.
const char* jqopt_isa(int i) {
  const auto& known = jqopt::isas();
  return i >= 0 && i < int(known.size()) ? known[i]->name : nullptr;
}
}
