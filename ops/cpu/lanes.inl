// SIMD vectors of N floats. Part of kernels.inl.

// Floats of a register. Of wider vectors, GCC keeps each element in memory.
constexpr int WIDE = RSE_FLOATS;

template <int N>
struct Lanes;

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
      Lanes<N / 2>::V low, high;                                                       \
      std::memcpy(&low, &v, sizeof(low));                                              \
      std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(low)); \
      return Lanes<N / 2>::sum(low + high);                                            \
    }                                                                                  \
  };
RSE_LANES(2)
RSE_LANES(4)
RSE_LANES(8)
RSE_LANES(16)
#undef RSE_LANES

// What a width is compiled as: itself, or 0, which is any.
constexpr int compiled(int width) { return RSE_MANY_WIDTHS || width == 16 ? width : 0; }

template <int W>
static inline i64 width_of(i64 w) { return W ? W : w; }

// Calls fn(Lanes<N>, k) for consecutive blocks [k, k + N) of a row. W: its width if known at compile time, else 0.
template <int W, class F>
static inline __attribute__((always_inline)) void blocks(i64 w, F&& fn) {
  if constexpr (W && W % WIDE == 0) {
    for (i64 k = 0; k < W; k += WIDE) fn(Lanes<WIDE>(), k);
  } else if constexpr (W) {
    fn(Lanes<W>(), i64(0));
  } else {
    i64 k = 0;
    for (; k + WIDE <= w; k += WIDE) fn(Lanes<WIDE>(), k);
    if (WIDE > 8 && k + 8 <= w) fn(Lanes<8>(), k), k += 8;
    if (WIDE > 4 && k + 4 <= w) fn(Lanes<4>(), k), k += 4;
    for (; k < w; k++) fn(Lanes<1>(), k);
  }
}

// Sum of fn(lanes, k) over a row: of 16 columns side by side, whatever a register holds, then of those behind them.
template <int W, class F>
static inline __attribute__((always_inline)) float row_sum(i64 w, F&& fn) {
  typedef Lanes<WIDE> L;
  constexpr int count = 16 / WIDE;
  const i64 width = width_of<W>(w);
  // One order for a width, whether the compiler knows it or not.
  if (width == 8) return Lanes<8>::sum(fn(Lanes<8>(), i64(0)));
  float total = 0.f;
  i64 k = width / 16 * 16;
  for (; k + 4 <= width; k += 4) total += Lanes<4>::sum(fn(Lanes<4>(), k));
  for (; k < width; k++) total += fn(Lanes<1>(), k);
  if (width < 16) return total;
  typename L::V wide[count];
  for (int j = 0; j < count; j++) wide[j] = L::all(0.f);  // by `auto&`, a vector would be taken to be aligned
  for (i64 at = 0; at + 16 <= width; at += 16)
    for (int j = 0; j < count; j++) wide[j] += fn(L(), at + j * WIDE);
  for (int half = count / 2; half; half /= 2)
    for (int j = 0; j < half; j++) wide[j] += wide[j + half];
  return total + L::sum(wide[0]);
}
