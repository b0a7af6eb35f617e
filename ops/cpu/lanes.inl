// SIMD vectors of N floats; where registers are narrower, the compiler uses several. Part of kernels.inl.

template <int N>
struct Lanes;

// A macro, not a template: GCC ignores the attribute where the size depends on a template parameter.
#define RSE_LANES(N)                                                                   \
  template <>                                                                          \
  struct Lanes<N> {                                                                    \
    typedef float V __attribute__((vector_size(4 * N), aligned(4), may_alias));        \
    static inline V load(const float* from) { return *reinterpret_cast<const V*>(from); } \
    static inline void store(float* to, V v) { *reinterpret_cast<V*>(to) = v; }        \
    static inline V all(float x) { return x - V{}; }                                   \
    static inline V far(V v) { return v < V{} ? -v : v; }                              \
    static inline V sign(V v) { return (v > V{} ? all(1.f) : V{}) - (v < V{} ? all(1.f) : V{}); } \
    static inline V root(V v) {                                                        \
      for (int j = 0; j < N; j++) v[j] = std::sqrt(v[j]);                              \
      return v;                                                                        \
    }                                                                                  \
    static inline float sum(V v) {                                                     \
      for (int half = N / 2; half; half /= 2)                                          \
        for (int j = 0; j < half; j++) v[j] += v[j + half];                            \
      return v[0];                                                                     \
    }                                                                                  \
  };
RSE_LANES(4)
RSE_LANES(8)
RSE_LANES(16)
#undef RSE_LANES

template <>
struct Lanes<1> {
  typedef float V;
  static inline V load(const float* from) { return *from; }
  static inline void store(float* to, V v) { *to = v; }
  static inline V all(float x) { return x; }
  static inline V far(V v) { return std::fabs(v); }
  static inline V sign(V v) { return float((v > 0.f) - (v < 0.f)); }
  static inline V root(V v) { return std::sqrt(v); }
  static inline float sum(V v) { return v; }
};

template <int W>
static inline i64 width_of(i64 w) { return W ? W : w; }

// Calls fn(Lanes<N>, k) for consecutive blocks [k, k + N) of a row. W: its width if known at compile time, else 0.
template <int W, class F>
static inline __attribute__((always_inline)) void blocks(i64 w, F&& fn) {
  if constexpr (W && W % 16 == 0) {
    for (i64 k = 0; k < W; k += 16) fn(Lanes<16>(), k);
  } else if constexpr (W) {
    fn(Lanes<W>(), i64(0));
  } else {
    i64 k = 0;
    for (; k + 16 <= w; k += 16) fn(Lanes<16>(), k);
    for (; k + 4 <= w; k += 4) fn(Lanes<4>(), k);
    for (; k < w; k++) fn(Lanes<1>(), k);
  }
}
