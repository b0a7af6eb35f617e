// Optimizer state of 16 and 8 bits; the same bits as recsys_embed/optim/state_format.py. Part of kernels.inl.
//
// The states of some rows are read into floats, where a rule changes them as it changes state in float32, and rounded.

static inline float float_of(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Elements [0, count) of a row's state, to floats. Without branches, so that compilers use vectors.
template <bool SIGNED>
static inline void read_bytes(i64 least, const unsigned char* __restrict from, i64 count, float* __restrict to) {
  const u32 first = u32(127 + least) * 4 - 1;
  for (i64 k = 0; k < count; k++) {
    const u32 code = from[k], size = SIGNED ? code & 127u : code;
    const u32 bits = size ? (size + first) << 21 : 0;
    to[k] = float_of(SIGNED ? bits | (code & 128u) << 24 : bits);
  }
}

static inline void read_brain_halves(const uint16_t* __restrict from, i64 count, float* __restrict to) {
  for (i64 k = 0; k < count; k++) to[k] = float_of(u32(from[k]) << 16);
}

static inline void read_states(const StateForm& form, const unsigned char* from, i64 count, float* to) {
  if (!form.bits) std::memcpy(to, from, 4 * count);
  else if (form.bits == 16) read_brain_halves(reinterpret_cast<const uint16_t*>(from), count, to);
  else if (form.has_sign) read_bytes<true>(form.least, from, count, to);
  else read_bytes<false>(form.least, from, count, to);
}

// Kinds of stored elements: 16 bits, or 8 with or without a sign.
enum StateKind { BRAIN, SIGNED_BYTES, BYTES };

// The code of states, given random words.
template <StateKind KIND, int N>
static inline __attribute__((always_inline)) typename Words<N>::U state_codes(i64 least, typename Lanes<N>::V v, typename Words<N>::U word) {
  typedef Words<N> S;
  typedef typename S::U U;
  if constexpr (KIND == BRAIN) return half_codes<BF16, N, true>(v, word);
  const U bits = S::bits(v), none = S::all(0u);
  U size = bits & 0x7FFFFFFFu;
  // Not a number stays one, whatever its sign.
  if (KIND == BYTES) size = bits > S::all(0x7FFFFFFFu) ? (size > S::all(0x7F800000u) ? size : none) : size;
  const U smallest = S::all(u32(127 + least) << 23), most = S::all(KIND == BYTES ? 255u : 127u);
  const U moved = ((size + (word >> 11)) >> 21) - (u32(127 + least) * 4 - 1), known = moved < most ? moved : most;
  // Below the least number: states that may be negative become 0 or it, others it.
  const typename S::V below = S::floats_of(size < smallest ? size : none) * float_of(u32(127 - least) << 23) + S::uniform(word);
  const U small = KIND == BYTES ? (size > none ? S::all(1u) : none) : (U)S::integers(below);
  const U code = size < smallest ? small : known;
  return KIND == BYTES ? code : code | (bits >> 24 & 128u);
}

// Rounds states [0, count); `words(lanes, k)`: random words from element k on.
template <StateKind KIND, class F>
static inline __attribute__((always_inline)) void round_states(i64 least, const float* from, i64 count, unsigned char* to, F&& words) {
  blocks<0>(count, [&](auto lanes, i64 k) __attribute__((always_inline)) {
    constexpr int N = sizeof(lanes.all(0.f)) / 4;
    typedef Words<N> S;
    const auto codes = state_codes<KIND, N>(least, lanes.load(from + k), words(S(), k));
    if constexpr (KIND == BRAIN) S::store_16(to + 2 * k, codes);
    else S::store(to + k, (typename S::I)codes);
  });
}

template <class F>
static inline __attribute__((always_inline)) void round_states(const StateForm& form, const float* from, i64 count, unsigned char* to, F&& words) {
  if (form.bits == 16) round_states<BRAIN>(form.least, from, count, to, words);
  else if (form.has_sign) round_states<SIGNED_BYTES>(form.least, from, count, to, words);
  else round_states<BYTES>(form.least, from, count, to, words);
}

// A step whose states are those of some rows, copied to floats: that of the i-th of them is row i.
struct StateBlock {
  static constexpr i64 MOST = 16;
  Update step;
  std::unique_ptr<float[]> memory;
  u64 base[4];                                     // of random bits in this step

  StateBlock(const Update& u, i64 width) : step(u) {
    step.rule.rounded = 0;
    step.last = nullptr;
    step.stored.bytes = 0;
    if (!u.rule.rounded) return;
    memory.reset(new float[MOST * (u.rule.elements * width + 4)]);
    float* at = memory.get();
    for (i64 i = 0; i < 4 && u.rule.state[i]; at += MOST * size(u.rule, i++, width)) step.rule.state[i] = at;
    begin(u.rule, u.step);
  }

  void begin(const Rule& r, i64 number) {
    for (i64 i = 0; i < 4; i++) base[i] = random_base(r.seed + 1 + i, number);
  }

  static i64 size(const Rule& r, i64 state, i64 width) { return state < r.elements ? width : 1; }
  static i64 row_bytes(const StateForm& form, i64 size) { return size * (form.bits ? form.bits / 8 : 4); }

  // One number of each row is copied to where those of the rows lie side by side, and back.
  RSE_ONCE void read(const Rule& r, const i64* rows, i64 count, i64 width) {
    for (i64 i = 0; i < 4 && r.state[i]; i++) {
      const StateForm& form = r.forms[i];
      const i64 elements = size(r, i, width), bytes = row_bytes(form, elements);
      const auto* from = reinterpret_cast<const unsigned char*>(r.state[i]);
      if (elements == 1) {
        alignas(4) unsigned char beside[4 * MOST];
        for (i64 k = 0; k < count; k++) std::memcpy(beside + k * bytes, from + rows[k] * bytes, bytes);
        read_states(form, beside, count, step.rule.state[i]);
        continue;
      }
      for (i64 k = 0; k < count; k++) read_states(form, from + rows[k] * bytes, elements, step.rule.state[i] + k * elements);
    }
  }

  RSE_ONCE void write(const Rule& r, const i64* rows, i64 count, i64 width) const {
    for (i64 i = 0; i < 4 && r.state[i]; i++) {
      const StateForm& form = r.forms[i];
      const i64 elements = size(r, i, width), bytes = row_bytes(form, elements);
      const float* from = step.rule.state[i];
      auto* to = reinterpret_cast<unsigned char*>(r.state[i]);
      if (!form.bits) {
        for (i64 k = 0; k < count; k++) std::memcpy(to + rows[k] * bytes, from + k * elements, bytes);
      } else if (elements == 1) {
        alignas(4) unsigned char beside[4 * MOST];
        u32 low[MOST], high[MOST];
        for (i64 k = 0; k < count; k++) {
          const Random random = random_of(base[i], rows[k]);
          low[k] = random.low, high[k] = random.high;
        }
        round_states(form, from, count, beside, [&](auto words, i64 k) __attribute__((always_inline)) { return random_words(words.load(low + k), words.load(high + k)); });
        for (i64 k = 0; k < count; k++) std::memcpy(to + rows[k] * bytes, beside + k * bytes, bytes);
      } else {
        for (i64 k = 0; k < count; k++) {
          const Random random = random_of(base[i], rows[k]);
          round_states(form, from + k * elements, elements, to + rows[k] * bytes, [&](auto words, i64 column) __attribute__((always_inline)) { return words.random(random, column); });
        }
      }
    }
  }
};
