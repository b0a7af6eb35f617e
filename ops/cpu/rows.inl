// Gradients of rows: duplicates are summed in order of occurrence, then each row is updated once. Work is divided by
// row, so results do not depend on the number of threads, bit for bit. Part of kernels.inl.

// Gradients of one row lookup: that of its b-th row is gradient + b * stride, times `factor` and, if there is another
// row it was multiplied by, times other + b * other_stride.
struct Base {
  const float* gradient;
  i64 stride;
  float factor;
  const float* other;
  i64 other_stride;
};

struct Source {
  i64 storage, num_rows, base, rows;  // num_rows > 1: a slice of the table [base, base + rows)
  i64 tag;                       // index of its gradients in Bases
  i64 count;                     // ids
  i32* of;                       // [count] row, -1 for none
  const i32* bag;                // [count] bag whose gradient each id takes; null: ids have their own

  i64 place(i64 b) const { return bag ? bag[b] : b; }
};

using Bases = std::vector<Base>;

static i64 count_lookups(const std::vector<Source>& sources) {
  i64 total = 0;
  for (const Source& s : sources) total += s.count;
  return total;
}

// Calls fn(source, id) for lookups [from, to), numbered source by source.
template <class F>
static void each_lookup(const std::vector<Source>& sources, i64 from, i64 to, F&& fn) {
  i64 start = 0;
  for (const Source& s : sources) {
    const i64 stop = std::min(to, start + s.count);
    for (; from < stop; from++) fn(s, from - start);
    start += s.count;
  }
}

// Reserves places for `count` rows of a sparse gradient. Their order differs between runs; the caller sorts them.
static inline i64 claim(const Update& u, i64 count) { return __atomic_fetch_add(u.touched_count, count, __ATOMIC_RELAXED); }

// An entry of a sort is a row, and the number of a lookup of its table in PLACE_BITS.
constexpr i64 PLACE_BITS = 33;

static inline u64 pack(i32 row, u64 place) { return u64(row) << PLACE_BITS | place; }

static inline i64 row_of(u64 entry) { return i64(entry >> PLACE_BITS); }

static inline bool same_row(u64 a, u64 b) { return (a ^ b) >> PLACE_BITS == 0; }

// Stable counting sort by `bits` bits of row - base, from bit `shift` on.
static void sort_digit(const u64* from, u64* to, i64 count, i64 base, i64 shift, i64 bits, i64 threads) {
  const i64 number = i64(1) << bits;
  std::vector<u32> counts(threads * number, 0);
  auto part = [&](i64 t) { return count * t / threads; };
  auto digit = [&](u64 entry) { return u64(row_of(entry) - base) >> shift & u64(number - 1); };
  parallel(threads, [&](i64 thread, i64 team) {
    for (i64 t = thread; t < threads; t += team)
      for (i64 i = part(t); i < part(t + 1); i++) counts[t * number + digit(from[i])]++;
  });
  u32 total = 0;
  for (i64 d = 0; d < number; d++)
    for (i64 t = 0; t < threads; t++) {
      const u32 here = counts[t * number + d];
      counts[t * number + d] = total;
      total += here;
    }
  parallel(threads, [&](i64 thread, i64 team) {
    for (i64 t = thread; t < threads; t += team) {
      u32* at = counts.data() + t * number;
      for (i64 i = part(t); i < part(t + 1); i++) to[at[digit(from[i])]++] = from[i];
    }
  });
}

// All lookups of one table. Those of a sample follow each other, source by source; those of bags come source by source.
struct TableReads {
  i64 base, rows;
  std::vector<Source> sources;
  bool bags;
  i64 bits;                      // of a lookup's number: its place in the part that is counted fastest

  TableReads(const Source& first, bool of_bags) : base(first.base), rows(first.rows), bags(of_bags), bits(0) {}

  void add(const Source& source) {
    sources.push_back(source);
    i64 most = i64(sources.size());
    for (const Source& s : sources) most = std::max(most, bags ? s.count : 0);
    while (most >> bits) bits++;
  }

  i64 lookups() const { return count_lookups(sources); }

  u64 number(i64 source, i64 b) const { return u64(bags ? source << bits | b : b << bits | source); }

  i32& row(u64 number) const {
    const u64 low = number & ((u64(1) << bits) - 1), high = number >> bits;
    return bags ? sources[high].of[low] : sources[low].of[high];
  }

  // Lookups before one of `parts` parts.
  i64 start(i64 part, i64 parts) const {
    return bags ? lookups() * part / parts : sources[0].count * part / parts * i64(sources.size());
  }

  // Calls fn(source, id) for one of `parts` parts of the lookups, in their order.
  template <class F>
  void walk(i64 part, i64 parts, F&& fn) const {
    const i64 number = i64(sources.size()), step = bags ? 1 : number, to = this->start(part + 1, parts) / step;
    i64 from = this->start(part, parts) / step, start = 0;
    if (bags)
      for (i64 s = 0; s < number; start += sources[s++].count)
        for (const i64 stop = std::min(to, start + sources[s].count); from < stop; from++) fn(s, from - start);
    else if (number == 1)
      for (; from < to; from++) fn(i64(0), from);
    else
      for (; from < to; from++)
        for (i64 s = 0; s < number; s++) fn(s, from);
  }
};

// The table's entries sorted by row, and their number, in one of two buffers.
static const u64* sorted_entries(const TableReads& table, u64* from, u64* to, i64 threads, i64& count) {
  std::vector<i64> filled(threads, 0);
  parallel(threads, [&](i64 thread, i64 team) {
    for (i64 t = thread; t < threads; t += team) {
      u64* const start = from + table.start(t, threads);
      u64* at = start;
      table.walk(t, threads, [&](i64 s, i64 b) {
        const i32 row = table.sources[s].of[b];
        *at = pack(row, table.number(s, b));
        at += row >= 0;
      });
      filled[t] = at - start;
    }
  });
  count = filled[0];
  for (i64 t = 1; t < threads; count += filled[t++])
    if (count != table.start(t, threads)) std::memmove(from + count, from + table.start(t, threads), filled[t] * sizeof(u64));
  i64 bits = 0;
  while ((table.rows - 1) >> bits) bits++;
  const i64 passes = (bits + 11) / 12;
  for (i64 p = 0, shift = 0; p < passes; p++, std::swap(from, to)) {
    const i64 digit = (bits - shift + passes - p - 1) / (passes - p);
    sort_digit(from, to, count, table.base, shift, digit, threads);
    shift += digit;
  }
  return from;
}

// Applies the deferred steps of the rows of sorted entries [from, to).
template <int W>
static void catch_up_sorted(const Update& u, float* table, i64 w, const u64* entries, i64 from, i64 to) {
  const i64 width = width_of<W>(w), ahead = 32;
  auto new_row = [&](i64 i) { return i == from || !same_row(entries[i], entries[i - 1]); };
  for (i64 i = from; i < to; i++) {
    if (i + ahead < to && new_row(i + ahead)) prefetch_state(u, table, row_of(entries[i + ahead]), width);
    if (new_row(i)) catch_up<W>(u, table, row_of(entries[i]), u.step, w);
  }
}

// Applies the deferred steps of rows[from, to) of a storage; where no rows are listed, of [from, to).
template <int W>
static void catch_up_listed(const Update& u, float* table, i64 w, const i64* rows, i64 from, i64 to) {
  for (i64 i = from; i < to; i++) catch_up<W>(u, table, rows ? rows[i] : i, u.step, w);
}

// Steps of listed rows, which are distinct: the gradient of rows[i] is values + i * width.
template <int W>
static void update_listed(const Update& u, float* table, i64 w, const i64* rows, const float* values, i64 from, i64 to) {
  constexpr i64 block = 64;
  const i64 width = width_of<W>(w);
  Row<W * block> memory(width * block);
  Summed found[block];
  for (i64 i = from; i < std::min(from + block, to); i++) prefetch_state(u, table, rows[i], width);
  for (i64 i = from; i < to; i += block) {
    const i64 count = std::min(block, to - i);
    for (i64 k = 0; k < count; k++) {
      const float* g = values + (i + k) * width;
      // A step overwrites gradients only to add weight decay to them.
      found[k] = {rows[i + k], u.decay == 0 ? const_cast<float*>(g) : memory.data() + k * width};
      if (u.decay != 0) blocks<W>(width, [&](auto lanes, i64 e) { lanes.store(found[k].gradient + e, lanes.load(g + e)); });
      if (i + k + block < to) prefetch_state(u, table, rows[i + k + block], width);
    }
    update_rows<W>(u, table, found, count, 0, i, w);
  }
}

