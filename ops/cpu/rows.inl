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
  const i32* of;                 // [count] row, -1 for none
  const i32* bag;                // [count] bag whose gradient each id takes; null: ids have their own

  i64 place(i64 b) const { return bag ? bag[b] : b; }
};

// A gradient is named by one number of PLACE_BITS: its base, then its place there, in as few bits as all places need.
constexpr i64 PLACE_BITS = 33;

struct Bases {
  std::vector<Base> all;
  i64 bits = 0;

  u64 pack(i64 tag, i64 place) const { return u64(tag) << bits | u64(place); }
};

template <bool PAIR>
static inline void prefetch_gradient(const Base& base, i64 place, i64 width) {
  prefetch(base.gradient + place * base.stride, 4 * width);
  if (PAIR && base.other) prefetch(base.other + place * base.other_stride, 4 * width);
}

// Stores (`first`) or adds the gradient at a place. PAIR: it may have to be multiplied by another row.
template <int W, bool PAIR>
static inline __attribute__((always_inline)) void add_gradient(const Base& base, i64 place, float* sum, bool first, i64 w) {
  const i64 width = width_of<W>(w);
  const float *g = base.gradient + place * base.stride, *other = PAIR && base.other ? base.other + place * base.other_stride : nullptr;
  const float factor = base.factor;
  blocks<W>(width, [&](auto lanes, i64 k) {
    auto v = lanes.load(g + k) * factor;
    if (PAIR && other) v *= lanes.load(other + k);
    lanes.store(sum + k, first ? v : lanes.load(sum + k) + v);
  });
}

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

static inline u64 pack(i32 row, u64 place) { return u64(row) << PLACE_BITS | place; }

static inline i64 row_of(u64 entry) { return i64(entry >> PLACE_BITS); }

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

// All lookups of one table, and two buffers for sorting them.
struct TableReads {
  i64 base, rows;
  std::vector<Source> sources;
  u64* entries[2];
};

// The table's entries sorted by row, and their number. Sorting pays because neighbouring rows share a page, and a miss
// of the address cache costs more than reading a row.
static const u64* sorted_entries(const TableReads& table, const Bases& bases, i64 threads, i64& count) {
  const i64 lookups = count_lookups(table.sources);
  u64 *from = table.entries[0], *to = table.entries[1];
  std::vector<i64> filled(threads, 0);
  auto part = [&](i64 t) { return lookups * t / threads; };
  parallel(threads, [&](i64 thread, i64 team) {
    for (i64 t = thread; t < threads; t += team) {
      i64 at = part(t);
      each_lookup(table.sources, part(t), part(t + 1), [&](const Source& s, i64 b) {
        from[at] = pack(s.of[b], bases.pack(s.tag, s.place(b)));
        at += s.of[b] >= 0;
      });
      filled[t] = at - part(t);
    }
  });
  count = filled[0];
  for (i64 t = 1; t < threads; count += filled[t++])
    if (count != part(t)) std::memmove(from + count, from + part(t), filled[t] * sizeof(u64));
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

// Sums the gradients of each row of sorted entries [from, to) and updates it; `at` is the first row's place in a sparse
// gradient. A block of rows is summed before it is updated: the end of a row's entries is hard to predict, and a branch
// that is predicted wrongly would delay the updates of the rows before it.
template <int W, bool PAIR>
static void update_sorted(const Update& u, float* table, i64 w, const Bases& bases, const u64* entries, i64 from, i64 to,
                          i64 at) {
  constexpr i64 block = 64;
  const i64 width = width_of<W>(w), ahead = 32;
  Row<W * block> memory(width * block);
  Summed rows[block];
  const Base* const all = bases.all.data();
  const u64 low = (u64(1) << PLACE_BITS) - 1, places = (u64(1) << bases.bits) - 1;
  const i64 bits = bases.bits;
  auto base = [&](u64 entry) -> const Base& { return all[(entry & low) >> bits]; };
  auto fetch = [&](i64 i) { prefetch_gradient<PAIR>(base(entries[i]), i64(entries[i] & places), width); };
  for (i64 i = from; i < std::min(from + ahead, to); i++) fetch(i);
  for (i64 i = from; i < to;) {
    i64 count = 0;
    for (float* sum = memory.data(); i < to && count < block; sum += width) {
      const i64 row = row_of(entries[i]);
      rows[count++] = {row, sum};
      prefetch_state(u, table, row, width);
      for (bool first = true; i < to && row_of(entries[i]) == row; i++, first = false) {
        fetch(std::min(i + ahead, to - 1));
        add_gradient<W, PAIR>(base(entries[i]), i64(entries[i] & places), sum, first, w);
      }
    }
    update_rows<W>(u, table, rows, count, at, w);
    at += count;
  }
}

// For tables of few rows: a buffer of the table's size takes all sums, without sorting.
template <int W, bool PAIR>
static void update_few(const Update& u, float* table, i64 w, const Bases& bases, const TableReads& reads,
                       std::vector<float>& sums) {
  const i64 width = width_of<W>(w), ahead = 8;
  std::vector<unsigned char> touched(reads.rows, 0);
  sums.resize(reads.rows * width);
  for (const Source& s : reads.sources) {
    const Base base = bases.all[s.tag];
    for (i64 b = 0; b < s.count; b++) {
      prefetch_gradient<PAIR>(base, s.place(std::min(b + ahead, s.count - 1)), width);
      if (s.of[b] < 0) continue;
      const i64 row = s.of[b] - reads.base;
      add_gradient<W, PAIR>(base, s.place(b), sums.data() + row * width, !touched[row], w);
      touched[row] = 1;
    }
  }
  i64 known = 0;
  for (unsigned char t : touched) known += t;
  i64 at = u.rule.number == SPARSE_GRADIENT ? claim(u, known) : 0;
  constexpr i64 block = 64;
  Summed rows[block];
  for (i64 first = 0, count = 0; first < reads.rows; first += block, at += count, count = 0) {
    for (i64 row = first; row < std::min(first + block, reads.rows); row++)
      if (touched[row]) rows[count++] = {reads.base + row, sums.data() + row * width};
    update_rows<W>(u, table, rows, count, at, w);
  }
}

// Applies the deferred steps of the rows of sorted entries [from, to).
template <int W>
static void catch_up_sorted(const Update& u, float* table, i64 w, const Bases&, const u64* entries, i64 from, i64 to, i64) {
  const i64 width = width_of<W>(w), ahead = 32;
  auto new_row = [&](i64 i) { return i == from || row_of(entries[i]) != row_of(entries[i - 1]); };
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
    update_rows<W>(u, table, found, count, i, w);
  }
}

using Visit = void (*)(const Update&, float*, i64, const Bases&, const u64*, i64, i64, i64);

// Functions over the rows of a table: update them, or apply their deferred steps.
struct Visits {
  Visit update, catch_up;
  void (*update_few)(const Update&, float*, i64, const Bases&, const TableReads&, std::vector<float>&);
  void (*catch_up_listed)(const Update&, float*, i64, const i64*, i64, i64);
  void (*update_listed)(const Update&, float*, i64, const i64*, const float*, i64, i64);
};

template <int W>
static Visits visits_of(bool pairs) {
  if (pairs) return {update_sorted<W, true>, catch_up_sorted<W>, update_few<W, true>, catch_up_listed<W>, update_listed<W>};
  return {update_sorted<W, false>, catch_up_sorted<W>, update_few<W, false>, catch_up_listed<W>, update_listed<W>};
}

static Visits choose_visits(i64 width, bool pairs = false) {
  switch (width) {
    case 1: return visits_of<1>(pairs);
    case 4: return visits_of<4>(pairs);
    case 8: return visits_of<8>(pairs);
    case 16: return visits_of<16>(pairs);
    case 32: return visits_of<32>(pairs);
    case 64: return visits_of<64>(pairs);
    case 128: return visits_of<128>(pairs);
    default: return visits_of<0>(pairs);
  }
}

static bool within(const Update& u, const i64* rows, i64 count) {
  for (i64 i = 0; i < count; i++)
    if (rows[i] < 0 || rows[i] >= u.rows) return false;
  return true;
}

// Applies the deferred steps of listed, distinct rows of a storage, or of all; false, and none is applied, where a row
// lies beyond it.
static bool catch_up_rows(const Update& u, float* table, i64 width, i64 threads, const i64* rows, i64 count) {
  if (rows && !within(u, rows, count)) return false;
  const auto catch_up = choose_visits(width).catch_up_listed;
  const i64 piece = 4096, end = rows ? count : u.rows;
  i64 next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 from; (from = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED)) < end;)
      catch_up(u, table, width, rows, from, std::min(from + piece, end));
  });
  return true;
}

// One step of listed, distinct rows of a storage; false, and none is made, where a row lies beyond it.
static bool update_listed_rows(const Update& u, float* table, i64 width, const i64* rows, const float* values, i64 count,
                               i64 threads) {
  if (!within(u, rows, count)) return false;
  const auto update = choose_visits(width).update_listed;
  const i64 piece = 1024;
  i64 next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 from; (from = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED)) < count;)
      update(u, table, width, rows, values, from, std::min(from + piece, count));
  });
  return true;
}

// Visits the rows of one table in pieces that split no row; a free thread takes the next piece.
static void visit_table(const Update& u, const TableReads& reads, float* table, i64 width, const Bases& bases, i64 threads,
                        Visit visit) {
  i64 count = 0;
  const u64* entries = sorted_entries(reads, bases, threads, count);
  const i64 pieces = threads == 1 ? 1 : std::min<i64>(1 + count / 2048, 16 * threads);
  auto start = [&](i64 p) {
    i64 at = count * p / pieces;
    while (at && at < count && row_of(entries[at]) == row_of(entries[at - 1])) at++;
    return at;
  };
  i64 next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 p; (p = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < pieces;) {
      const i64 from = start(p), to = start(p + 1);
      i64 place = 0;
      if (u.rule.number == SPARSE_GRADIENT) {
        i64 known = 0;
        for (i64 i = from; i < to; i++) known += i == from || row_of(entries[i]) != row_of(entries[i - 1]);
        place = claim(u, known);
      }
      visit(u, table, width, bases, entries, from, to, place);
    }
  });
}

// One thread per table, except tables with so many lookups that one thread would take longest: those use all threads.
static void visit_rows(const Call& c, const std::vector<Source>& sources, const Bases& bases, const Update& u,
                       float* table, i64 width, bool catch_up, Scratch& scratch) {
  bool pairs = false;
  for (const Source& s : sources) pairs |= bases.all[s.tag].other != nullptr;
  const Visits visits = choose_visits(width, pairs);
  std::vector<TableReads> tables;
  for (const Source& s : sources) {
    auto same = [&](const TableReads& t) { return t.base == s.base; };
    auto found = std::find_if(tables.begin(), tables.end(), same);
    if (found == tables.end()) found = tables.insert(tables.end(), TableReads{s.base, s.rows, {}, {nullptr, nullptr}});
    found->sources.push_back(s);
  }
  std::vector<const TableReads*> narrow;
  const i64 all = count_lookups(sources);
  for (TableReads& t : tables) {
    for (u64*& entries : t.entries)
      entries = static_cast<u64*>(scratch.take(count_lookups(t.sources) * sizeof(u64)));
    if (c.threads > 1 && count_lookups(t.sources) * c.threads * 2 > all)
      visit_table(u, t, table, width, bases, c.threads, catch_up ? visits.catch_up : visits.update);
    else narrow.push_back(&t);
  }
  auto work = [](const TableReads* a, const TableReads* b) {
    return a->rows * count_lookups(a->sources) > b->rows * count_lookups(b->sources);
  };
  std::stable_sort(narrow.begin(), narrow.end(), work);
  i64 next = 0;
  parallel(c.threads, [&](i64, i64) {
    std::vector<float> sums;
    for (u64 i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < narrow.size();) {
      const TableReads& t = *narrow[i];
      const bool few = t.rows * 2 <= count_lookups(t.sources) && t.rows * width <= 65536;
      if (few && !catch_up) visits.update_few(u, table, width, bases, t, sums);
      else visit_table(u, t, table, width, bases, 1, catch_up ? visits.catch_up : visits.update);
    }
  });
}
