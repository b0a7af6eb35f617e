// Steps of rows that are stored in few bits: decoded, stepped in floats, and rounded. Part of kernels.inl.

// The widths that these are compiled for apart; 0 is any.
constexpr int common_width(int width) { return width == 16 || width == 64 ? width : 0; }

static inline unsigned char* stored_at(const Update& u, float* table, i64 row) {
  return reinterpret_cast<unsigned char*>(table) + row * u.stored.bytes;
}

static void catch_up_stored(const Update& u, float* table, i64 row, i64 from, i64 to, i64 width) {
  StoredRow<0> weights(u, table, row, width);
  for (i64 t = from; t <= to; t++) {
    step_without_gradient<0>(u, weights.read(), row, t, t, width);
    weights.write(t);
  }
}

template <i64 KIND, int W>
static void update_rows_of(const Update& u, float* table, const Summed* rows, i64 count, i64 w) {
  const i64 width = width_of<W>(w);
  const float size = size_of(u, u.step), eps = epsilon_of(u, u.step), decay = float(u.decay), distance = float(u.stored.step);
  const u64 base = random_base(u.stored.seed, u.step);
  Stored format = u.stored;
  format.kind = KIND;
  Row<W> memory(width);
  float* const weight = memory.data();
  constexpr i64 ahead = 16;
  Rules::with(u.rule, [&](const auto& rule) {
    for (i64 i = 0; i < count; i++) {
      if (i + ahead < count) prefetch_state(u, table, rows[i + ahead].row, width);
      const i64 row = rows[i].row;
      if (u.last) {
        catch_up<W>(u, table, row, u.step - 1, w);
        u.last[row] = i32(u.step);
      }
      unsigned char* const stored = stored_at(u, table, row);
      decode_row_of<KIND, W>(stored, width, weight, distance);
      step_row<W>(u, rule, weight, rows[i].gradient, row, size, eps, decay, w);
      const Random random = random_of(base, row);
      round_row<W>(format, weight, w, stored, format.stochastic ? &random : nullptr);
    }
  });
}

// One step on each row; overwrites its gradient. W: a common width.
template <int W>
static void update_stored_rows(const Update& u, float* table, const Summed* rows, i64 count, i64 w) {
  switch (u.stored.kind) {
    case FP16: return update_rows_of<FP16, 0>(u, table, rows, count, w);
    case BF16: return update_rows_of<BF16, 0>(u, table, rows, count, w);
    case STEP_INT8: return update_rows_of<STEP_INT8, W>(u, table, rows, count, w);
    default: return update_rows_of<STEP_INT4, W>(u, table, rows, count, w);
  }
}
