// Steps of rows that are stored in few bits, or whose state is: copied to floats, stepped, and rounded. Part of kernels.inl.

using StepRows = void (*)(const Update&, float*, const Summed*, i64, i64, i64);

// Copies of some rows in floats, which are written back to where they are stored.
struct RowBlock {
  const Stored& stored;
  RowCoder coder;
  std::unique_ptr<float[]> memory;

  RowBlock(const Stored& s, i64 width) : stored(s), coder{nullptr, nullptr} {
    if (!s.bytes) return;
    coder = choose_coder(s.kind, width);
    memory.reset(new float[StateBlock::MOST * width]);
  }

  void read(const float* table, const i64* rows, i64 count, i64 width) const {
    if (stored.bytes) coder.decode(stored, reinterpret_cast<const unsigned char*>(table), width, rows, count, memory.get());
  }

  void write(float* table, const i64* rows, i64 count, i64 width, i64 step) const {
    if (stored.bytes) coder.round(stored, memory.get(), width, rows, 0, count, step, reinterpret_cast<unsigned char*>(table));
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
    weights.write(table, &row, 1, width, t);
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
    weights.write(table, at, n, width, u.step);
    if (u.rule.rounded) states.write(u.rule, at, n, width);
  }
}
