// Optimizer state of 16 and 8 bits; the same bits as recsys_embed/optim/state_format.py. Part of kernels.inl.
//
// The state of a row is read into floats, where a rule changes it as it changes state in float32, and is rounded.

static inline float float_of(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float read_state(const StateForm& form, const unsigned char* from, i64 k) {
  if (form.bits == 16) {
    uint16_t half;
    std::memcpy(&half, from + 2 * k, 2);
    return float_of(u32(half) << 16);
  }
  const u32 code = from[k], size = form.has_sign ? code & 127u : code;
  const u32 bits = size ? (size - 1 + u32(127 + form.least) * 4) << 21 : 0;
  return float_of(form.has_sign ? bits | (code & 128u) << 24 : bits);
}

static inline void write_state(const StateForm& form, float value, u32 word, unsigned char* to, i64 k) {
  if (form.bits == 16) {
    const uint16_t half = brain_half_of(value, &word);
    std::memcpy(to + 2 * k, &half, 2);
    return;
  }
  u32 bits;
  std::memcpy(&bits, &value, 4);
  const u32 size = !form.has_sign && value < 0 ? 0 : bits & 0x7FFFFFFFu, most = form.has_sign ? 127 : 255;
  u32 code = (size + (word >> 11) >> 21) - u32(127 + form.least) * 4 + 1;
  code = code < most ? code : most;
  if (size < u32(127 + form.least) << 23)  // below the least number
    code = form.has_sign ? u32(float_of(size) * float_of(u32(127 - form.least) << 23) + Words<1>::uniform(word)) : size > 0;
  to[k] = (unsigned char)(form.has_sign ? code | (bits >> 24 & 128u) : code);
}

// A step whose state is that of one row, in floats.
struct RowState {
  Update step;
  std::vector<float> memory;

  RowState(const Update& u, i64 width) : step(u), memory(u.rule.elements * width + 4) {
    step.rule.rounded = 0;
    step.last = nullptr;
  }

  static i64 size(const Rule& r, i64 state, i64 width) { return state < r.elements ? width : 1; }

  void read(const Rule& r, i64 row, i64 width) {
    float* at = memory.data();
    for (i64 i = 0; i < 4 && r.state[i]; i++) {
      const i64 count = size(r, i, width);
      if (!r.forms[i].bits) {
        step.rule.state[i] = r.state[i] + row * count;
        continue;
      }
      const auto* from = reinterpret_cast<const unsigned char*>(r.state[i]) + row * count * r.forms[i].bits / 8;
      for (i64 k = 0; k < count; k++) at[k] = read_state(r.forms[i], from, k);
      step.rule.state[i] = at;
      at += count;
    }
  }

  void write(const Rule& r, i64 row, i64 width, i64 number) const {
    for (i64 i = 0; i < 4 && r.state[i]; i++) {
      if (!r.forms[i].bits) continue;
      const i64 count = size(r, i, width);
      const Random random = random_of(random_base(r.seed + 1 + i, number), row);
      auto* to = reinterpret_cast<unsigned char*>(r.state[i]) + row * count * r.forms[i].bits / 8;
      for (i64 k = 0; k < count; k++) write_state(r.forms[i], step.rule.state[i][k], Words<1>::random(random, k), to, k);
    }
  }
};
