// Rows of integers that have a step of their own, which learns. Part of kernels.inl.
//
// They stand as served rows do: the step and the bias, in fp16, before the codes. The same bits as RowFormat in
// recsys_embed/core/row_format.py.

static inline bool has_steps(const Stored& s) { return s.bytes && (s.kind == INT8 || s.kind == INT4); }

// The step of a row after a step of the optimizer from `before` to `after`.
static float moved_step(const Stored& s, const float* before, const float* after, i64 width, float step) {
  const float half = float(1 << (bits_of(s.kind) - 1));
  double total = 0;
  for (i64 k = 0; k < width; k++) {
    const float x = after[k] / step;
    const float slope = x >= half - 1 ? half - 1 : x <= -half ? -half : std::nearbyint(x) - x;
    total += (double(after[k]) - double(before[k])) * double(slope);
  }
  const double old = step, moved = old + total * s.step_rate;
  if (!std::isfinite(total)) return step;
  return float(std::clamp(std::clamp(moved, old / 2, old * 2), 0x1p-16, 256.));
}

static inline uint16_t half_of(float value, const u32* random) {
  return uint16_t(random ? half_codes<FP16, 1, true>(value, *random) : half_codes<FP16, 1, false>(value, 0));
}

// Rounds a row; with `before`, the floats before a step of the optimizer, its step learns first.
template <i64 KIND>
static void round_row_with_step(const Stored& s, const float* before, const float* values, i64 width, unsigned char* to, const Random* random) {
  float step = half_to_float(read_16(to));
  if (before) {
    const u32 word = random ? Words<1>::random(*random, width) : 0;
    const uint16_t bits = half_of(moved_step(s, before, values, width, step), random ? &word : nullptr);
    step = half_to_float(bits);
    const uint16_t bias = half_of(-float(1 << (bits_of(KIND) - 1)) * step, nullptr);
    std::memcpy(to, &bits, 2);
    std::memcpy(to + 2, &bias, 2);
  }
  round_row<KIND == INT8 ? STEP_INT8 : STEP_INT4, 0>(Division(step), values, width, to + 4, random);
}
