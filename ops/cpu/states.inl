// Optimizer state of 16 and 8 bits; the same bits as recsys_embed/optim/state_format.py. Part of kernels.inl.
//
// The state of a row is read into floats, where a rule changes it as it changes state in float32, and is rounded.

static inline float float_of(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline u32 bits_of(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
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

template <bool SIGNED>
static inline void write_bytes(i64 least, const float* __restrict from, Random random, i64 count, unsigned char* __restrict to) {
  const u32 first = u32(127 + least) * 4 - 1, smallest = u32(127 + least) << 23, most = SIGNED ? 127 : 255;
  const float scale = float_of(u32(127 - least) << 23);
  for (i64 k = 0; k < count; k++) {
    const u32 word = Words<1>::random(random, k), bits = bits_of(from[k]);
    const u32 size = !SIGNED && bits >> 31 && bits <= 0xFF800000u ? 0 : bits & 0x7FFFFFFFu;
    const u32 moved = ((size + (word >> 11)) >> 21) - first, known = moved < most ? moved : most;
    // Below the least number: states that may be negative become 0 or it, others it.
    const float below = float_of(size < smallest ? size : 0) * scale + Words<1>::uniform(word);
    const u32 small = SIGNED ? u32(i32(below)) : u32(size > 0);
    const u32 code = size < smallest ? small : known;
    to[k] = (unsigned char)(SIGNED ? code | (bits >> 24 & 128u) : code);
  }
}

static inline void write_brain_halves(const float* __restrict from, Random random, i64 count, uint16_t* __restrict to) {
  for (i64 k = 0; k < count; k++) {
    const u32 bits = bits_of(from[k]), size = bits & 0x7FFFFFFFu;
    const u32 special = bits | (size > 0x7F800000u ? 1u << 22 : 0);
    to[k] = uint16_t((size < 0x7F800000u ? bits + (Words<1>::random(random, k) >> 16) : special) >> 16);
  }
}

// A step whose state is that of one row, in floats.
struct RowState {
  Update step;
  std::vector<float> memory;
  u64 base[4];                                     // of random bits in this step

  RowState(const Update& u, i64 width) : step(u), memory(u.rule.elements * width + 4) {
    step.rule.rounded = 0;
    step.last = nullptr;
    begin(u.rule, u.step);
  }

  void begin(const Rule& r, i64 number) {
    for (i64 i = 0; i < 4; i++) base[i] = random_base(r.seed + 1 + i, number);
  }

  static i64 size(const Rule& r, i64 state, i64 width) { return state < r.elements ? width : 1; }

  void read(const Rule& r, i64 row, i64 width) {
    float* at = memory.data();
    for (i64 i = 0; i < 4 && r.state[i]; i++) {
      const i64 count = size(r, i, width);
      const StateForm& form = r.forms[i];
      if (!form.bits) {
        step.rule.state[i] = r.state[i] + row * count;
        continue;
      }
      const auto* from = reinterpret_cast<const unsigned char*>(r.state[i]) + row * count * form.bits / 8;
      if (form.bits == 16) read_brain_halves(reinterpret_cast<const uint16_t*>(from), count, at);
      else if (form.has_sign) read_bytes<true>(form.least, from, count, at);
      else read_bytes<false>(form.least, from, count, at);
      step.rule.state[i] = at;
      at += count;
    }
  }

  void write(const Rule& r, i64 row, i64 width) const {
    for (i64 i = 0; i < 4 && r.state[i]; i++) {
      const StateForm& form = r.forms[i];
      if (!form.bits) continue;
      const i64 count = size(r, i, width);
      const Random random = random_of(base[i], row);
      const float* from = step.rule.state[i];
      auto* to = reinterpret_cast<unsigned char*>(r.state[i]) + row * count * form.bits / 8;
      if (form.bits == 16) write_brain_halves(from, random, count, reinterpret_cast<uint16_t*>(to));
      else if (form.has_sign) write_bytes<true>(form.least, from, random, count, to);
      else write_bytes<false>(form.least, from, random, count, to);
    }
  }
};
