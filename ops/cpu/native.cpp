// Lookup programs on the CPU: forward, and backward with the optimizer fused, of all features in one call.
//
// A C interface over raw pointers: no header of Python or torch, so one build serves every version of both. Threads are
// those of the runtime that torch uses, handed in by the caller, so the two never compete for cores.
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

namespace {

constexpr i64 CHUNK = 256;  // ids that one pass of a transform takes at most
constexpr i64 BAG_CHUNK = 128;
enum Outcome { DONE = 0, OUT_OF_RANGE = 1, TOO_LARGE = 2, NO_MEMORY = 3 };

// OpenMP's entry points as GCC calls them; LLVM's and Intel's runtimes have them too.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*team)();
} runtime = {nullptr, nullptr, nullptr};

// fn(thread, threads of the team).
template <class F>
void parallel(i64 threads, F&& fn) {
  if (threads <= 1 || !runtime.parallel) {
    fn(0, 1);
    return;
  }
  // No exception may leave a thread of the team: the caller's thread throws it again.
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

// Memory of one backward. Blocks stay for the next one: new pages cost as much as the work done in them.
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
    const i64 size = std::max<i64>(bytes, 1 << 20);
    char* memory = static_cast<char*>(std::aligned_alloc(64, size));
    if (!memory) throw std::bad_alloc();
    blocks_.push_back({memory, size, bytes});
    return memory;
  }

  // All is free again. Many small blocks become one, so that a steady workload settles.
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

namespace plain {
#include "kernels.inl"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RSE_WIDE 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,f16c")
namespace avx2 {
#include "kernels.inl"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,popcnt,f16c,prefer-vector-width=512")
namespace avx512 {
#include "kernels.inl"
}
#pragma GCC pop_options
#endif

struct Variant {
  const char* name;
  bool (*look_up)(const Call&, i64, i64);
  int (*backward)(const Call&, const Update*, bool, Scratch&);
  void (*catch_up_all)(const Update&, float*, i64, i64);
  bool (*mask)(const Mask&, i64, i64);
  bool (*mask_backward)(const Mask&, i64);
};

const Variant variants[] = {
    {"plain", plain::look_up, plain::backward, plain::catch_up_all, plain::mask, plain::mask_backward},
#ifdef RSE_WIDE
    {"avx2", avx2::look_up, avx2::backward, avx2::catch_up_all, avx2::mask, avx2::mask_backward},
    {"avx512", avx512::look_up, avx512::backward, avx512::catch_up_all, avx512::mask, avx512::mask_backward},
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

// Sizes of the records, which the caller compares with its own.
RSE_API i64 rse_record_sizes(i64 which) {
  const i64 sizes[] = {sizeof(Transform), sizeof(RowLookup), sizeof(Feature), sizeof(Call), sizeof(Update), sizeof(Mask)};
  return sizes[which];
}

// Kinds and fields of transforms, which the caller compares likewise.
RSE_API const char* rse_transform_layout() { return TRANSFORM_LAYOUT; }

// Names of the optimizers' rules in order of their numbers, each followed by a space.
RSE_API const char* rse_rules() {
  static const std::string names = plain::Rules::names();
  return names.c_str();
}

// The kernels to run: one of "plain", "avx2", "avx512", or null for the best here. Returns the name, null if none fits.
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

// One step of all storages; with `catch_up`, the steps that rows of the batch missed, which forward does not apply.
RSE_API int rse_backward(const Call* c, const Update* updates, int catch_up) try {
  std::unique_lock<std::mutex> lock(scratch_lock, std::try_to_lock);
  if (!lock.owns_lock()) {  // another thread is in a backward of its own
    Scratch own;
    return active->backward(*c, updates, catch_up, own);
  }
  shared_scratch.reset();
  return active->backward(*c, updates, catch_up, shared_scratch);
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// All steps that rows of a storage [update->rows, width] missed.
RSE_API int rse_catch_up(const Update* update, float* table, i64 width, i64 threads) try {
  active->catch_up_all(*update, table, width, threads);
  return DONE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}

// Vectors that some other lookup made, masked.
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

// Gradients of a mask's vectors and parameters; its ids are those that a forward took, or it is refused.
RSE_API int rse_mask_backward(const Mask* m, i64 threads) try {
  return active->mask_backward(*m, threads) ? DONE : OUT_OF_RANGE;
} catch (const std::bad_alloc&) {
  return NO_MEMORY;
}
}
