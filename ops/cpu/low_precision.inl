// Steps of rows that are stored in few bits, or whose state is: copied to floats, stepped, and rounded. Part of kernels.inl.

// Rounds rows of floats [count, width] in a step of the optimizer and stores them as `rows`, or from row `first` on.
// `before`: the floats before the step, by which rows that have steps of their own learn them; null: they do not learn.
template <i64 KIND, int W>
static void round_rows(const Stored& s, const float* before, const float* values, i64 w, const i64* rows, i64 first, i64 count, i64 step, unsigned char* table) {
  const u64 base = random_base(s.seed, step);
  const Division by{float(s.step)};
  for (i64 i = 0; i < count; i++) {
    const i64 row = rows ? rows[i] : first + i;
    const Random random = random_of(base, row);
    const i64 at = i * width_of<W>(w);
    unsigned char* const to = table + row * s.bytes;
    if constexpr (KIND == INT8 || KIND == INT4) round_row_with_step<KIND>(s, before ? before + at : nullptr, values + at, w, to, s.stochastic ? &random : nullptr);
    else round_row<KIND, W>(by, values + at, w, to, s.stochastic ? &random : nullptr);
  }
}

// Copies rows to floats [count, width].
template <i64 KIND, int W>
static void decode_rows(const Stored& s, const unsigned char* table, i64 w, const i64* rows, i64 count, float* to) {
  const i64 width = width_of<W>(w);
  for (i64 i = 0; i < count; i++) decode_row_of<KIND, W>(table + rows[i] * s.bytes, width, to + i * width, float(s.step));
}

// How rows that train in few bits are read and written.
struct RowCoder {
  void (*decode)(const Stored&, const unsigned char*, i64, const i64*, i64, float*);
  void (*round)(const Stored&, const float*, const float*, i64, const i64*, i64, i64, i64, unsigned char*);
};

// Widths that these are compiled for apart are those of most tables.
template <i64 KIND>
static RowCoder coder_of(i64 width) {
  if constexpr (KIND == STEP_INT8 || KIND == STEP_INT4) {
    if (width == 16) return {decode_rows<KIND, 16>, round_rows<KIND, 16>};
    if (width == 64) return {decode_rows<KIND, compiled(64)>, round_rows<KIND, compiled(64)>};
  }
  return {decode_rows<KIND, 0>, round_rows<KIND, 0>};
}

static RowCoder choose_coder(i64 kind, i64 width) {
  switch (kind) {
    case FP16: return coder_of<FP16>(width);
    case BF16: return coder_of<BF16>(width);
    case INT8: return coder_of<INT8>(width);
    case INT4: return coder_of<INT4>(width);
    case STEP_INT8: return coder_of<STEP_INT8>(width);
    default: return coder_of<STEP_INT4>(width);
  }
}

using StepRows = void (*)(const Update&, float*, const Summed*, i64, i64, i64);

// Copies of some rows in floats, which are written back to where they are stored.
struct RowBlock {
  const Stored& stored;
  RowCoder coder;
  std::unique_ptr<float[]> memory, before;

  RowBlock(const Stored& s, i64 width) : stored(s), coder{nullptr, nullptr} {
    if (!s.bytes) return;
    coder = choose_coder(s.kind, width);
    memory.reset(new float[StateBlock::MOST * width]);
    if (has_steps(s)) before.reset(new float[StateBlock::MOST * width]);
  }

  void read(const float* table, const i64* rows, i64 count, i64 width) const {
    if (!stored.bytes) return;
    coder.decode(stored, reinterpret_cast<const unsigned char*>(table), width, rows, count, memory.get());
    if (before) std::copy_n(memory.get(), count * width, before.get());
  }

  // In a step of the optimizer, by gradients or without.
  void write(float* table, const i64* rows, i64 count, i64 width, i64 step, bool by_gradient) const {
    if (stored.bytes)
      coder.round(stored, by_gradient ? before.get() : nullptr, memory.get(), width, rows, 0, count, step, reinterpret_cast<unsigned char*>(table));
  }

  // Floats of the i-th of the rows that were read.
  float* row(float* table, const i64* rows, i64 i, i64 width) const { return stored.bytes ? memory.get() + i * width : table + rows[i] * width; }
};

static RSE_ONCE void step_rounded_without_gradient(const Update& u, float* table, i64 row, i64 from, i64 to, i64 width) {
  StateBlock states(u, width);
  const RowBlock weights(u.stored, width);
  for (i64 t = from; t <= to; t++) {
    weights.read(table, &row, 1, width);
    if (u.rule.rounded) states.read(u.rule, &row, 1, width);
    step_without_gradient<0>(states.step, weights.row(table, &row, 0, width), u.rule.rounded ? 0 : row, t, t, width);
    weights.write(table, &row, 1, width, t, false);
    states.begin(u.rule, t);
    if (u.rule.rounded) states.write(u.rule, &row, 1, width);
  }
}

// One step on each row; may overwrite its gradient. `step_rows`: of their width.
static RSE_ONCE void step_rounded_rows(const Update& u, float* table, const Summed* rows, i64 count, i64 width, StepRows step_rows) {
  constexpr i64 MOST = StateBlock::MOST;
  StateBlock states(u, width);
  const RowBlock weights(u.stored, width);
  for (i64 from = 0; from < count; from += MOST) {
    const i64 n = std::min(MOST, count - from);
    i64 at[MOST];
    Summed block[MOST];
    for (i64 i = from + MOST; i < std::min(count, from + 2 * MOST); i++) prefetch_state(u, table, rows[i].row, width);
    for (i64 i = 0; i < n; i++) {
      const i64 row = at[i] = rows[from + i].row;
      block[i] = {u.rule.rounded ? i : row, rows[from + i].gradient, weights.row(table, at, i, width)};
      if (!u.last) continue;
      catch_up<0>(u, table, row, u.step - 1, width);
      u.last[row] = i32(u.step);
    }
    weights.read(table, at, n, width);
    if (u.rule.rounded) states.read(u.rule, at, n, width);
    step_rows(states.step, nullptr, block, n, 0, width);
    weights.write(table, at, n, width, u.step, true);
    if (u.rule.rounded) states.write(u.rule, at, n, width);
  }
}
