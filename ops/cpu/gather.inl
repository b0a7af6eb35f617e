// Gathers the rows of a chunk of ids and combines them into vectors. Part of kernels.inl.

static inline float sign_of(i64 id, i64 salt) { return i64(splitmix(u64(id) ^ u64(salt))) < 0 ? -1.f : 1.f; }

static inline i64 step_salt(i64 salt, i64 step) { return i64(u64(salt) + u64(step) * 0x9E3779B97F4A7C15ull); }

// Whether rows are multiplied by a factor per id. Slices have a sign per element instead, see gather_slices.
static bool has_factor(const RowLookup& p) { return p.scale != 1.0 || (p.has_sign && p.num_rows == 1) || p.weight_storage >= 0; }

static void factors(const RowLookup& p, const i64* ids, const float* weights, i64 n, float* out) {
  for (i64 i = 0; i < n; i++) out[i] = float(p.scale);
  if (p.has_sign && p.num_rows == 1)
    for (i64 i = 0; i < n; i++) out[i] *= sign_of(ids[i], p.sign);
  if (weights)
    for (i64 i = 0; i < n; i++) out[i] *= weights[i];
}

static inline void join_into(float& out, float value, i64 join) {
  out = join == STORE ? value : join == ADD ? out + value : out * value;
}

// One table to read, and the rows to read for a chunk of ids.
struct Slot {
  const char* table;
  i64 bytes;                // from a row to the next
  const i32* rows;
  const float* factor;      // of each id; null where none has one
  i64 base, end;            // rows of the table
};

// Items of one shape: each combines `count` slots and writes them from columns[item] on, or writes `empty` if no slot
// has a row. Samples are the outer loop, in the memory order of outputs; looping over features first takes up to twice
// as long.
struct Group {
  i64 output, width, kind, join, count;
  bool factor;
  bool slices;              // rows are elements, of which `width` are read, around the table's end
  u64 repeated;             // bit per slot of an item: its row is one element, broadcast to the width
  float empty, step;        // value where no slot has a row; distance of the codes of rows that train
  std::vector<Slot> slots;
  std::vector<i64> columns;

  bool fits(const Group& o) const {
    return output == o.output && width == o.width && kind == o.kind && join == o.join && count == o.count &&
           factor == o.factor && slices == o.slices && repeated == o.repeated && empty == o.empty && step == o.step;
  }
};

// Addresses of a chunk's rows in reading order; null: no row. The padding behind them is prefetched and never read.
struct Found {
  static constexpr i64 AHEAD = 32;
  std::vector<const char*> rows;
  std::vector<float> factors, around;
  std::vector<u64> first;

  void set(const Group& g, i64 n) {
    const i64 number = g.slots.size();
    if (i64(rows.size()) < n * number + AHEAD + g.count) rows.resize(n * number + AHEAD + g.count);
    if (g.factor && i64(factors.size()) < n * number) factors.resize(n * number);
    for (i64 s = 0; s < number; s++) {
      const Slot& from = g.slots[s];
      const char** to = rows.data() + s;
      for (i64 i = 0; i < n; i++, to += number) *to = from.rows[i] < 0 ? nullptr : from.table + i64(from.rows[i]) * from.bytes;
      for (i64 i = 0; g.factor && i < n; i++) factors[i * number + s] = from.factor[i];
    }
    if (g.slices) copy_around(g, n);
  }

  // Slices around the end of their table are read from copies.
  void copy_around(const Group& g, i64 n) {
    const i64 number = g.slots.size();
    i64 count = 0;
    for (const Slot& from : g.slots)
      for (i64 i = 0; i < n; i++) count += from.rows[i] > from.end - g.width;
    if (!count) return;
    around.resize(count * g.width);
    float* to = around.data();
    for (i64 s = 0; s < number; s++) {
      const Slot& from = g.slots[s];
      const float* const table = reinterpret_cast<const float*>(from.table);
      for (i64 i = 0; i < n; i++) {
        const i64 row = from.rows[i], straight = from.end - row;
        if (straight >= g.width) continue;
        rows[i * number + s] = reinterpret_cast<const char*>(to);
        to = std::copy_n(table + row, straight, to);
        to = std::copy_n(table + from.base, g.width - straight, to);
      }
    }
  }

  // As `set`, of samples whose ids are rows of the slots' tables: the id of slot s is ids[s]. False where one is none.
  bool set_by_ids(const Group& g, const std::vector<u64>& limits, const i64* ids, i64 stride, i64 n) {
    const i64 number = g.slots.size();
    if (i64(rows.size()) < n * number + AHEAD + g.count) rows.resize(n * number + AHEAD + g.count);
    first.resize(number);
    for (i64 s = 0; s < number; s++) first[s] = reinterpret_cast<u64>(g.slots[s].table);
    const u64 bytes = u64(g.slots[0].bytes), *tables = first.data(), *limit = limits.data();
    u64 wrong = 0, *to = reinterpret_cast<u64*>(rows.data());
    for (i64 i = 0; i < n; i++, ids += stride, to += number)
      for (i64 s = 0; s < number; s++) {
        const u64 id = u64(ids[s]), inside = id < limit[s];
        wrong |= inside ^ 1;
        to[s] = (tables[s] + u64(u32(id)) * bytes) & (0 - inside);
      }
    return !wrong;
  }

  // Calls fn(rows, factors, out) for each item and prefetches later rows. COUNT: slots of an item, 0 if not known.
  // `anywhere`: rows are not aligned to cache lines.
  template <int COUNT, class F>
  inline __attribute__((always_inline)) void each(const Group& g, i64 n, i64 bytes, bool anywhere, const Matrix& out, F&& fn) const {
    const i64 items = g.columns.size(), count = COUNT ? COUNT : g.count;
    const i64* const columns = g.columns.data();
    const char* const* from = rows.data();
    const float* by = factors.data();
    for (i64 i = 0; i < n; i++) {
      float* const row = out.data + i * out.stride;
      for (i64 m = 0; m < items; m++, from += count, by += count) {
        for (i64 j = 0; j < count; j++) {
          prefetch(from[AHEAD + j], bytes);
          if (anywhere) prefetch(from[AHEAD + j] + bytes - 1, 1);
        }
        fn(from, by, row + columns[m]);
      }
    }
  }
};

#include "stored.inl"

template <int W, int J, bool FACTOR, int COUNT>
static void read_floats(const Group& g, const Found& found, i64 n, const Matrix& out) {
  const i64 width = width_of<W>(g.width);
  const i64 count = COUNT ? COUNT : g.count;
  found.each<COUNT>(g, n, 4 * width, COUNT == 1 && g.slices, out, [&](const char* const* rows, const float* factors, float* o) {
    if (COUNT == 1 && !rows[0]) return blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(o + k, lanes.all(g.empty)); });
    blocks<W>(width, [&](auto lanes, i64 k) {
      auto value = [&](i64 j) {
        const float* q = reinterpret_cast<const float*>(rows[j]);
        auto v = J != STORE && g.repeated >> j & 1 ? lanes.all(q[0]) : lanes.load(q + k);
        if (FACTOR) v *= factors[j];
        return v;
      };
      auto v = COUNT == 1 || rows[0] ? value(0) : lanes.all(g.empty);
      for (i64 j = 1; j < count; j++)
        if (rows[j]) v = J == MUL ? v * value(j) : v + value(j);
      lanes.store(o + k, v);
    });
  });
}

using ReadGroup = void (*)(const Group&, const Found&, i64, const Matrix&);

template <int W, int J, int COUNT>
static ReadGroup reader_of(const Group& g) {
  return g.factor ? read_floats<W, J, true, COUNT> : read_floats<W, J, false, COUNT>;
}

template <int W>
static ReadGroup reader_of(const Group& g) {
  if (g.join == STORE) return reader_of<W, STORE, 1>(g);
  if (g.join == MUL) return g.count == 2 ? reader_of<W, MUL, 2>(g) : reader_of<W, MUL, 0>(g);
  return g.count == 2 ? reader_of<W, ADD, 2>(g) : reader_of<W, ADD, 0>(g);
}

static ReadGroup choose_reader(const Group& g) {
  if (g.kind != FP32) return choose_decoder(g);
  switch (g.width) {
    case 1: return reader_of<compiled(1)>(g);
    case 4: return reader_of<compiled(4)>(g);
    case 8: return reader_of<compiled(8)>(g);
    case 16: return reader_of<16>(g);
    case 32: return reader_of<compiled(32)>(g);
    case 64: return reader_of<compiled(64)>(g);
    case 128: return reader_of<compiled(128)>(g);
    default: return reader_of<0>(g);
  }
}
