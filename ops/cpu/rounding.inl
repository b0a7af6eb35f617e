// Rounds float rows to few bits; the same bits as recsys_embed/core/stochastic_rounding.py. Part of kernels.inl.

static inline u64 mix64(u64 z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Random bits of a row in a step of the optimizer.
struct Random {
  u32 low, high;
};

static inline u64 random_base(i64 seed, i64 step) { return mix64(u64(seed) + u64(step) * 0x9E3779B97F4A7C15ull); }

static inline Random random_of(u64 base, i64 row) {
  const u64 key = mix64(base ^ u64(row));
  return {u32(key), u32(key >> 32)};
}

// Integers beside Lanes<N>.
template <int N>
struct Words;

// `high` is one for all columns, or one for each.
template <class U, class H>
static inline __attribute__((always_inline)) U random_words(U x, H high) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= high;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

#define RSE_WORDS(N)                                                                                              \
  template <>                                                                                                     \
  struct Words<N> {                                                                                               \
    typedef typename Lanes<N>::V V;                                                                               \
    typedef u32 U __attribute__((vector_size(4 * N), aligned(4), may_alias));                                     \
    typedef i32 I __attribute__((vector_size(4 * N), aligned(4), may_alias));                                     \
    /* Of columns [k, k + N). */                                                                                  \
    static inline U random(Random r, i64 k) {                                                                     \
      U column;                                                                                                   \
      for (int j = 0; j < N; j++) column[j] = u32(j);                                                             \
      return random_words<U>((column + u32(k)) * 0x9E3779B9u + r.low, r.high);                                    \
    }                                                                                                             \
    static inline V uniform(U x) { return __builtin_convertvector((I)(x >> 8), V) * 0x1p-24f; }                   \
    static inline I integers(V v) { return __builtin_convertvector(v, I); }                                       \
    static inline V floats(I i) { return __builtin_convertvector(i, V); }                                         \
    static inline U all(u32 x) { return x - U{}; }                                                                \
    static inline U load(const u32* from) { return *reinterpret_cast<const U*>(from); }                           \
    static inline U bits(V v) { return (U)v; }                                                                    \
    static inline V floats_of(U bits) { return (V)bits; }                                                         \
    static inline void store(unsigned char* to, I i) {                                                            \
      typedef unsigned char B __attribute__((vector_size(N)));                                                    \
      const B bytes = __builtin_convertvector(i, B);                                                              \
      std::memcpy(to, &bytes, N);                                                                                 \
    }                                                                                                             \
    static inline void store_16(unsigned char* to, U i) {                                                         \
      typedef uint16_t H __attribute__((vector_size(2 * N)));                                                     \
      const H halves = __builtin_convertvector(i, H);                                                             \
      std::memcpy(to, &halves, 2 * N);                                                                            \
    }                                                                                                             \
  };
RSE_WORDS(4)
RSE_WORDS(8)
RSE_WORDS(16)
#undef RSE_WORDS

template <>
struct Words<1> {
  typedef float V;
  typedef u32 U;
  typedef i32 I;
  static inline U random(Random r, i64 k) { return random_words<U>(u32(k) * 0x9E3779B9u + r.low, r.high); }
  static inline V uniform(U x) { return float(i32(x >> 8)) * 0x1p-24f; }
  static inline I integers(V v) { return i32(v); }
  static inline V floats(I i) { return float(i); }
  static inline U all(u32 x) { return x; }
  static inline U load(const u32* from) { return *from; }
  static inline U bits(V v) {
    u32 found;
    std::memcpy(&found, &v, 4);
    return found;
  }
  static inline V floats_of(U bits) {
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
  }
  static inline void store(unsigned char* to, I i) { *to = (unsigned char)(i); }
  static inline void store_16(unsigned char* to, U i) {
    const uint16_t half = uint16_t(i);
    std::memcpy(to, &half, 2);
  }
};

// Divides by the distance of two codes. That of a power of two is a product, with the same bits in less time.
struct Division {
  float step, inverse;
  bool exact;

  explicit Division(float by) : step(by), inverse(1.f / by) {
    u32 bits;
    std::memcpy(&bits, &by, 4);
    exact = !(bits & 0x7FFFFFu);
  }
};

// Signed codes of values: stochastic with `random`, else the nearest, ties to even. Not a number becomes 0.
template <int N>
static inline __attribute__((always_inline)) typename Words<N>::I codes_of(typename Lanes<N>::V v, const Division& by, float half, const Random* random, i64 k) {
  typedef Lanes<N> L;
  typedef Words<N> S;
  typedef typename L::V V;
  V x = by.exact ? v * by.inverse : v / by.step;
  x = x == x ? x : L::all(0.f);
  // Within reach of integers; the outermost codes absorb what lies beyond them.
  x = x < L::all(-1000.f) ? L::all(-1000.f) : x;
  x = x > L::all(1000.f) ? L::all(1000.f) : x;
  // Adding and taking away 1.5 * 2^23 leaves an integer, rounded to nearest.
  V whole = (x + 0x1.8p23f) - 0x1.8p23f;
  if (random) {
    const V sum = x + S::uniform(S::random(*random, k));
    whole = S::floats(S::integers(sum));
    whole = whole > sum ? whole - 1.f : whole;
  }
  whole = whole < L::all(-half) ? L::all(-half) : whole;
  return S::integers(whole > L::all(half - 1.f) ? L::all(half - 1.f) : whole);
}

// float32 to 16 bits, in the low half of a word. Magnitudes grow by the random bits, those of `word`, and are cut.
template <i64 KIND, int N, bool RANDOM>
static inline __attribute__((always_inline)) typename Words<N>::U half_codes(typename Lanes<N>::V v, typename Words<N>::U word) {
  typedef Words<N> S;
  typedef typename S::U U;
  const U bits = S::bits(v), size = bits & 0x7FFFFFFFu, infinite = S::all(0x7F800000u);
  if constexpr (KIND == BF16) {
    const U quiet = bits | (size > infinite ? S::all(0x400000u) : S::all(0u));
    const U moved = bits + (RANDOM ? word >> 16 : (bits >> 16 & 1u) + 0x7FFFu);
    return (size < infinite ? moved : quiet) >> 16;
  } else {
    const U least = S::all(0x38800000u);
    // Below 2^-14 the distance of two halves is 2^-24.
    const typename S::V scaled = S::floats_of(size < least ? size : S::all(0u)) * 0x1p24f;
    const typename S::V near = RANDOM ? scaled + S::uniform(word) : (scaled + 0x1p23f) - 0x1p23f;
    const U small = (U)S::integers(near), moved = size + (RANDOM ? word >> 19 : (size >> 13 & 1u) + 0xFFFu);
    const U known = moved < S::all(0x47800000u) ? (moved - 0x38000000u) >> 13 : S::all(0x7C00u);
    const U finite = size < least ? small : known;
    return (bits >> 16 & 0x8000u) | (size > infinite ? S::all(0x7E00u) : finite);
  }
}

// Codes of columns [from, from + count), one to a byte.
template <int W>
static inline __attribute__((always_inline)) void codes_of_row(const float* values, i64 from, i64 count, const Division& step, float half, const Random* random, unsigned char* to) {
  // By hand, because GCC calls it otherwise, and reads what it captures from memory.
  blocks<W>(count, [&](auto lanes, i64 k) __attribute__((always_inline)) {
    constexpr int N = sizeof(lanes.all(0.f)) / 4;
    const auto codes = codes_of<N>(lanes.load(values + from + k), step, half, random, from + k) + i32(half);
    Words<N>::store(to + k, codes);
  });
}

// Writes a row of floats in the format of the storage; `random` null: rounds to nearest.
template <i64 KIND, int W>
static inline __attribute__((always_inline)) void round_row(const Division& step, const float* from, i64 w, unsigned char* to, const Random* random) {
  const i64 width = width_of<W>(w);
  if constexpr (KIND == FP16 || KIND == BF16) {
    blocks<W>(width, [&](auto lanes, i64 k) __attribute__((always_inline)) {
      constexpr int N = sizeof(lanes.all(0.f)) / 4;
      typedef Words<N> S;
      const auto v = lanes.load(from + k);
      S::store_16(to + 2 * k, random ? half_codes<KIND, N, true>(v, S::random(*random, k)) : half_codes<KIND, N, false>(v, S::all(0u)));
    });
    return;
  } else if constexpr (bits_of(KIND) == 8) {
    return codes_of_row<W>(from, 0, width, step, 128.f, random, to);
  }
  constexpr i64 most = 64;
  unsigned char codes[most];
  for (i64 k = 0; k < width; k += most) {
    const i64 count = std::min(most, width - k);
    if (W && W <= most) codes_of_row<W <= most ? W : 0>(from, k, count, step, 8.f, random, codes);
    else codes_of_row<0>(from, k, count, step, 8.f, random, codes);
    if (count & 1) codes[count] = 0;
    i64 at = 0;
    for (; at + 8 <= count; at += 8) {  // two codes to a byte, eight at a time
      u64 word;
      std::memcpy(&word, codes + at, 8);
      word = (word | word >> 4) & 0x00FF00FF00FF00FFull;
      word = (word | word >> 8) & 0x0000FFFF0000FFFFull;
      const u32 packed = u32(word | word >> 16);
      std::memcpy(to + (k + at) / 2, &packed, 4);
    }
    for (; at < count; at += 2) to[(k + at) / 2] = (unsigned char)(codes[at] | codes[at + 1] << 4);
  }
}
