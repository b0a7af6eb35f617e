// Lookup programs on the CPU: forward, and backward fused with the optimizer step, for all features in one call.
//
// The interface is C over raw pointers, without headers of Python or torch, so one build works with every version of
// both. Threads come from torch's own OpenMP runtime, which the caller passes in, so the two never compete for cores.
#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

// Of what is called once for many rows: not compiled again for each caller, or for each constant that one passes.
#if defined(__GNUC__) && !defined(__clang__)
#define RSE_ONCE __attribute__((noinline, noclone))
#else
#define RSE_ONCE __attribute__((noinline))
#endif

namespace {

constexpr i64 CHUNK = 256;  // most ids per call of a transform
constexpr i64 BAG_CHUNK = 128;
enum Outcome { DONE = 0, OUT_OF_RANGE = 1, TOO_LARGE = 2, NO_MEMORY = 3 };

// OpenMP entry points of GCC's runtime; those of LLVM and Intel export them too.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*team)();
} runtime = {nullptr, nullptr, nullptr};

// A forked child has no thread of its parent, and OpenMP would wait for them for ever.
void run_alone() { runtime.parallel = nullptr; }

// Calls fn(thread, number of threads) in each thread.
template <class F>
void parallel(i64 threads, F&& fn) {
  if (threads <= 1 || !runtime.parallel) {
    fn(0, 1);
    return;
  }
  // An exception must not leave a worker thread: it is caught there and thrown again in the caller's.
  struct Region {
    std::remove_reference_t<F>* fn;
    bool failed;
  } region = {&fn, false};
  auto run = [](void* data) {
    Region& r = *static_cast<Region*>(data);
    try {
      (*r.fn)(runtime.thread(), runtime.team());
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&r.failed, true, __ATOMIC_RELAXED);
    }
  };
  runtime.parallel(run, &region, unsigned(threads), 0);
  if (region.failed) throw std::bad_alloc();
}

// Temporary memory of a backward, on huge pages if the OS allows. It is reused by the next, because the page faults of new
// memory cost as much as the work.
class Scratch {
 public:
  ~Scratch() {
    for (Block& b : blocks_) std::free(b.memory);
  }

  void* take(i64 bytes) {
    bytes = (bytes + 63) / 64 * 64;
    for (Block& b : blocks_)
      if (b.size - b.used >= bytes) {
        b.used += bytes;
        return b.memory + b.used - bytes;
      }
    constexpr i64 huge = 1 << 21;
    const i64 size = bytes < huge ? std::max<i64>(bytes, 1 << 20) : (bytes + huge - 1) / huge * huge;
    char* memory = static_cast<char*>(std::aligned_alloc(size < huge ? 64 : huge, size));
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (size >= huge) madvise(memory, size, MADV_HUGEPAGE);
#endif
    blocks_.push_back({memory, size, bytes});
    return memory;
  }

  // Frees all for reuse. Several blocks are replaced by one, so that a steady workload stops allocating.
  void reset() {
    i64 size = 0;
    for (Block& b : blocks_) size += b.size, b.used = 0;
    if (blocks_.size() > 1) {
      for (Block& b : blocks_) std::free(b.memory);
      blocks_.clear();
      take(size);
      blocks_[0].used = 0;
    }
  }

 private:
  struct Block {
    char* memory;
    i64 size, used;
  };
  std::vector<Block> blocks_;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RSE_WIDE 1
#endif

// Kernels are compiled for many widths apart; but few of those for processors without AVX2, where others are known: each
// makes the library take longer to compile.
#ifdef RSE_WIDE
#define RSE_MANY_WIDTHS 0
#else
#define RSE_MANY_WIDTHS 1
#endif

// Floats of a vector register. GCC's macros of instruction sets do not follow the pragmas below.
#define RSE_FLOATS 4
namespace plain {
#include "kernels.inl"
}
#undef RSE_FLOATS
#undef RSE_MANY_WIDTHS

#ifdef RSE_WIDE
#define RSE_MANY_WIDTHS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,f16c")
#define RSE_FLOATS 8
namespace avx2 {
#include "kernels.inl"
}
#undef RSE_FLOATS
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,popcnt,f16c,prefer-vector-width=512")
#define RSE_FLOATS 16
namespace avx512 {
#include "kernels.inl"
}
#undef RSE_FLOATS
#pragma GCC pop_options
#endif

struct Variant {
  const char* name;
  bool (*look_up)(const Call&, i64, i64);
  int (*backward)(const Call&, const Update*, bool, Scratch&);
  bool (*catch_up_rows)(const Update&, float*, i64, i64, const i64*, i64);
  bool (*update_listed_rows)(const Update&, float*, i64, const i64*, const float*, i64, i64);
  bool (*mask)(const Mask&, i64, i64);
  bool (*mask_backward)(const Mask&, i64);
  void (*train)(const Train&, i64, i64);
};

const Variant variants[] = {
    {"plain", plain::look_up, plain::backward, plain::catch_up_rows, plain::update_listed_rows, plain::mask, plain::mask_backward, plain::train},
#ifdef RSE_WIDE
    {"avx2", avx2::look_up, avx2::backward, avx2::catch_up_rows, avx2::update_listed_rows, avx2::mask, avx2::mask_backward, avx2::train},
    {"avx512", avx512::look_up, avx512::backward, avx512::catch_up_rows, avx512::update_listed_rows, avx512::mask, avx512::mask_backward, avx512::train},
#endif
};

bool runs_here(const char* name) {
#ifdef RSE_WIDE
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return !std::strcmp(name, "plain");
}

const Variant* active = nullptr;

std::mutex scratch_lock;
Scratch shared_scratch;

}  // namespace

#if defined(__GNUC__)
#define RSE_API __attribute__((visibility("default")))
#else
#define RSE_API
#endif

extern "C" {

// Size of a record, for the caller to compare with its own.
RSE_API i64 rse_record_sizes(i64 which) {
  const i64 sizes[] = {sizeof(Transform), sizeof(RowLookup), sizeof(Feature), sizeof(Call), sizeof(Update), sizeof(Mask), sizeof(Train), sizeof(Stored)};
  return sizes[which];
}

// Kinds and fields of transforms, for the caller to compare with its own.
RSE_API const char* rse_transform_layout() { return TRANSFORM_LAYOUT; }

// Names of optimizer rules in order of their numbers, each followed by a space.
RSE_API const char* rse_rules() {
  static const std::string names = plain::Rules::names();
  return names.c_str();
}

// Selects the instruction set: "plain", "avx2", "avx512", or null for the best available. Returns its name; null if none.
RSE_API const char* rse_select(const char* wanted) {
  const Variant* found = nullptr;
  for (const Variant& v : variants)
    if (runs_here(v.name) && (!wanted || !std::strcmp(wanted, v.name))) found = &v;
  if (found) active = found;
  return found ? found->name : nullptr;
}

RSE_API void rse_set_runtime(void* parallel_entry, void* thread, void* team) {
  runtime.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel_entry);
  runtime.thread = reinterpret_cast<int (*)()>(thread);
  runtime.team = reinterpret_cast<int (*)()>(team);
#if !defined(_WIN32)
  static const int watched = pthread_atfork(nullptr, nullptr, run_alone);
  if (watched != 0) run_alone();
#endif
}

RSE_API int rse_forward(const Call* c) try {
  bool good = true;
  parallel(c->threads, [&](i64 thread, i64 team) {
    if (!active->look_up(*c, c->batch * thread / team, c->batch * (thread + 1) / team))
      __atomic_store_n(&good, false, __ATOMIC_RELAXED);
  });
  return good ? DONE : OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// Whether n offsets start at 0, never decrease, and end at `count`; or, not `closed`, there or below.
RSE_API i64 rse_offsets_fit(const i64* offsets, i64 n, i64 count, i64 closed) {
  if (n < 1 || offsets[0] != 0 || offsets[n - 1] > count || (closed && offsets[n - 1] != count)) return 0;
  i64 falls = 0;
  for (i64 i = 1; i < n; i++) falls |= offsets[i] < offsets[i - 1];
  return !falls;
}

// One step of all storages; with `catch_up`, only the deferred steps of the batch's rows, as needed before rse_forward.
RSE_API int rse_backward(const Call* c, const Update* updates, int catch_up) try {
  std::unique_lock<std::mutex> lock(scratch_lock, std::try_to_lock);
  if (!lock.owns_lock()) {  // another thread is running a backward
    Scratch own;
    return active->backward(*c, updates, catch_up, own);
  }
  shared_scratch.reset();
  return active->backward(*c, updates, catch_up, shared_scratch);
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// Applies all deferred steps of `count` distinct rows of a storage [update->rows, width]; of all where `rows` is null.
RSE_API int rse_catch_up(const Update* update, float* table, i64 width, i64 threads, const i64* rows, i64 count) try {
  return active->catch_up_rows(*update, table, width, threads, rows, count) ? DONE : OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// One step of `count` distinct rows of a storage [update->rows, width], given their gradients [count, width].
RSE_API int rse_update_rows(const Update* update, float* table, i64 width, const i64* rows, const float* values, i64 count,
                            i64 threads) try {
  return active->update_listed_rows(*update, table, width, rows, values, count, threads) ? DONE : OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// Products of the slices of a tensor train, or, with gradients of these, those of the slices.
RSE_API int rse_train(const Train* t, i64 threads) try {
  parallel(threads, [&](i64 thread, i64 team) { active->train(*t, t->count * thread / team, t->count * (thread + 1) / team); });
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// Masks vectors that another lookup computed.
RSE_API int rse_mask(const Mask* m, i64 threads) try {
  bool good = true;
  parallel(threads, [&](i64 thread, i64 team) {
    if (!active->mask(*m, m->batch * thread / team, m->batch * (thread + 1) / team))
      __atomic_store_n(&good, false, __ATOMIC_RELAXED);
  });
  return good ? DONE : OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// Gradients of a mask's vectors and parameters; OUT_OF_RANGE if the ids are not valid (any more).
RSE_API int rse_mask_backward(const Mask* m, i64 threads) try {
  return active->mask_backward(*m, threads) ? DONE : OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
}
