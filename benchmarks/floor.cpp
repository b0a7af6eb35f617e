// What the memory allows: rows copied from a table to an output, read ahead by prefetching, and nothing else.
// Built without an OpenMP runtime of its own: the loop runs in the threads of the one that torch has loaded.
#include <cstdint>
#include <cstring>

namespace {
constexpr int64_t kAhead = 16, kLine = 64;

template <int64_t kBytes>
void gather(const char* table, int64_t stride, const int64_t* rows, int64_t n, int64_t bytes, char* out, int threads) {
  const int64_t size = kBytes ? kBytes : bytes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    if (i + kAhead < n) {
      const char* next = table + rows[i + kAhead] * stride;
      for (int64_t at = 0; at < size; at += kLine) __builtin_prefetch(next + at);
    }
    std::memcpy(out + i * size, table + rows[i] * stride, size);
  }
}
}  // namespace

extern "C" {
void floor_gather(const char* table, int64_t stride, const int64_t* rows, int64_t n, int64_t bytes, char* out,
                  int threads) {
  switch (bytes) {
    case 32: return gather<32>(table, stride, rows, n, bytes, out, threads);
    case 64: return gather<64>(table, stride, rows, n, bytes, out, threads);
    case 128: return gather<128>(table, stride, rows, n, bytes, out, threads);
    case 256: return gather<256>(table, stride, rows, n, bytes, out, threads);
    default: return gather<0>(table, stride, rows, n, bytes, out, threads);
  }
}
}
