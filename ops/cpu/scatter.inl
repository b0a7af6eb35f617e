// Gradients to rows: duplicates are summed in order of occurrence, then each row is updated once. Work is divided by
// row, not by thread, so results are the same bits for any number of threads. Part of kernels.inl.

// Gradients of one read of a table: of its b-th row at gradient + b * stride, times factor and, where there is one, times
// the row at other + b * other_stride.
struct Base {
  const float* gradient;
  i64 stride;
  float factor;
  const float* other;
  i64 other_stride;
};

struct Source {
  i64 storage, run, base, rows;  // run > 1: consecutive elements of the table [base, base + rows)
  i64 tag;                       // of its gradients among the bases
  i64 count;                     // ids
  const i32* of;                 // [count] row, -1 for none
  const i32* bag;                // [count], or null: ids have the gradients of their bags

  i64 place(i64 b) const { return bag ? bag[b] : b; }
};

// A gradient as one number of PLACE_BITS: which base, and its place there in as many bits as the last place needs.
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

// sum = (or +=) the gradient at a place. PAIR: it may have another row to be multiplied with.
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

template <int W>
static inline float mean_square(const float* g, i64 w) {
  float total = 0.f;
  auto wide = Lanes<16>::all(0.f);
  blocks<W>(w, [&](auto lanes, i64 k) {
    const auto v = lanes.load(g + k);
    if constexpr (sizeof(v) == sizeof(wide)) wide += v * v;
    else total += lanes.sum(v * v);
  });
  if (!W || W >= 16) total += Lanes<16>::sum(wide);
  return total / float(width_of<W>(w));
}

// Elements of one row, in registers where its width is known.
template <int W>
struct Row {
  float fixed[W ? W : 1];
  std::vector<float> memory;
  explicit Row(i64 width) : memory(W ? 0 : width) {}
  float* data() { return W ? fixed : memory.data(); }
};

// Steps of one element of each lane, given its gradient: what Adagrad and Adam do, once or many times in a row.
struct AdagradStep {
  template <class L, class V>
  static inline void run(L lanes, V v, V& weight, V& sum, float size, float eps) {
    sum += v * v;
    weight -= v / (lanes.root(sum) + eps) * size;
  }
};

struct AdamStep {
  float rest1, rest2;
  explicit AdamStep(const Update& u) : rest1(float(1 - u.beta1)), rest2(float(1 - u.beta2)) {}
  template <class L, class V>
  inline void run(L lanes, V v, V& weight, V& mean, V& square, float size, float eps) const {
    mean += (v - mean) * rest1, square += (v * v - square) * rest2;
    weight -= mean / (lanes.root(square) + eps) * size;
  }
};

static inline float* state_of(const Update& u, i64 which, i64 place) {
  return u.state[which] ? u.state[which] + place : nullptr;
}

static inline float size_of(const Update& u, i64 step) { return float(u.sizes[step - u.first - 1]); }
static inline float epsilon_of(const Update& u, i64 step) { return float(u.epsilons[step - u.first - 1]); }

// Steps that a row missed, up to `to`: its gradient was its decay alone.
template <int W>
static inline void catch_up(const Update& u, float* table, i64 row, i64 to, i64 w) {
  if (!u.last || u.last[row] >= to) return;
  const i64 width = width_of<W>(w), place = row * width, from = u.last[row] + 1;
  const float decay = float(u.decay);
  float *weight = table + place, *first = state_of(u, 0, place), *second = state_of(u, 1, place);
  u.last[row] = i32(to);
  switch (u.rule) {
    case SGD:
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k);
        for (i64 t = from; t <= to; t++) x -= x * decay * size_of(u, t);
        lanes.store(weight + k, x);
      });
      break;
    case ADAGRAD:
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), sum = lanes.load(first + k);
        for (i64 t = from; t <= to; t++) AdagradStep::run(lanes, x * decay, x, sum, size_of(u, t), epsilon_of(u, t));
        lanes.store(weight + k, x), lanes.store(first + k, sum);
      });
      break;
    case ROWWISE_ADAGRAD: {
      Row<W> memory(width);
      float *g = memory.data(), sum = u.state[0][row];
      for (i64 t = from; t <= to; t++) {
        blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(g + k, lanes.load(weight + k) * decay); });
        const float step = size_of(u, t) / (std::sqrt(sum += mean_square<W>(g, w)) + epsilon_of(u, t));
        blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * step); });
      }
      u.state[0][row] = sum;
      break;
    }
    default: {
      const AdamStep adam(u);
      // Rows that were never read stay where they are, unless they decay.
      float moved = decay;
      for (i64 k = 0; decay == 0 && k < width; k++) moved += std::abs(first[k]) + second[k];
      if (moved == 0) break;
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), mean = lanes.load(first + k), square = lanes.load(second + k);
        for (i64 t = from; t <= to; t++) adam.run(lanes, x * decay, x, mean, square, size_of(u, t), epsilon_of(u, t));
        lanes.store(weight + k, x), lanes.store(first + k, mean), lanes.store(second + k, square);
      });
    }
  }
}

// One step of the rule on a row whose summed gradient is g; `at` is the row's place in a sparse gradient.
template <int W>
static inline void update_row(const Update& u, float* table, i64 row, i64 at, float* g, i64 w) {
  const i64 width = width_of<W>(w), place = row * width;
  float *weight = table + place, *first = state_of(u, 0, place), *second = state_of(u, 1, place);
  if (u.rule >= DENSE_GRADIENT) {
    const bool sparse = u.rule == SPARSE_GRADIENT;
    if (sparse) u.touched[at] = row;
    float* to = u.gradient + (sparse ? at * width : place);
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(g + k)); });
    return;
  }
  if (u.last) {
    catch_up<W>(u, table, row, u.step - 1, w);
    u.last[row] = i32(u.step);
  }
  if (u.decay != 0)
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(g + k, lanes.load(g + k) + lanes.load(weight + k) * float(u.decay)); });
  float size = size_of(u, u.step);
  const float eps = epsilon_of(u, u.step);
  switch (u.rule) {
    case SGD:
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * size); });
      break;
    case ADAGRAD:
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), sum = lanes.load(first + k);
        AdagradStep::run(lanes, lanes.load(g + k), x, sum, size, eps);
        lanes.store(weight + k, x), lanes.store(first + k, sum);
      });
      break;
    case ROWWISE_ADAGRAD: {
      const float step = size / (std::sqrt(u.state[0][row] += mean_square<W>(g, w)) + eps);
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * step); });
      break;
    }
    default: {
      const AdamStep adam(u);
      if (u.count) size *= float(u.corrections[std::min<i64>(++u.count[row], u.correction_count) - 1]);
      blocks<W>(width, [&](auto lanes, i64 k) {
        auto x = lanes.load(weight + k), mean = lanes.load(first + k), square = lanes.load(second + k);
        adam.run(lanes, lanes.load(g + k), x, mean, square, size, eps);
        lanes.store(weight + k, x), lanes.store(first + k, mean), lanes.store(second + k, square);
      });
    }
  }
}

static inline void prefetch_state(const Update& u, const float* table, i64 row, i64 width) {
  if (u.rule < DENSE_GRADIENT) prefetch<1>(table + row * width, 4 * width);
  if (u.rule == ROWWISE_ADAGRAD) prefetch<1>(u.state[0] + row, 4);
  if (u.rule == ADAGRAD || u.rule == ADAM) prefetch<1>(u.state[0] + row * width, 4 * width);
  if (u.rule == ADAM) prefetch<1>(u.state[1] + row * width, 4 * width);
  if (u.last) prefetch<1>(u.last + row, 4);
  if (u.count) prefetch<1>(u.count + row, 4);
}

static i64 count_lookups(const std::vector<Source>& sources) {
  i64 total = 0;
  for (const Source& s : sources) total += s.count;
  return total;
}

// Lookups [from, to) of all sources, numbered source after source: fn(source, id).
template <class F>
static void each_lookup(const std::vector<Source>& sources, i64 from, i64 to, F&& fn) {
  i64 start = 0;
  for (const Source& s : sources) {
    const i64 stop = std::min(to, start + s.count);
    for (; from < stop; from++) fn(s, from - start);
    start += s.count;
  }
}

// Places for `count` rows of a sparse gradient. Their order differs from run to run; whoever called sorts them.
static inline i64 claim(const Update& u, i64 count) { return __atomic_fetch_add(u.touched_count, count, __ATOMIC_RELAXED); }

// -- rows -------------------------------------------------------------------------------------------------------------

static inline u64 pack(i32 row, u64 place) { return u64(row) << PLACE_BITS | place; }

static inline i64 row_of(u64 entry) { return i64(entry >> PLACE_BITS); }

// Counting sort by `bits` bits of row - base from `shift` on; equal ones keep their order.
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

// All reads of one table, and memory for its entries, twice.
struct TableReads {
  i64 base, rows;
  std::vector<Source> sources;
  u64* entries[2];
};

// The table's entries sorted by row, and their number. Neighbouring rows share pages, and walking to a page takes longer
// than reading a row of it.
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

// Sorted entries [from, to): sums each row's gradients and updates it; `at` is the first row's place in a sparse gradient.
// Rows are summed a block at a time and then updated: where a row's entries end is hard to foresee, and a wrong guess
// would hold up the updates of the rows before.
template <int W, bool PAIR>
static void update_sorted(const Update& u, float* table, i64 w, const Bases& bases, const u64* entries, i64 from, i64 to,
                          i64 at) {
  constexpr i64 block = 64;
  const i64 width = width_of<W>(w), ahead = 32;
  Row<W * block> memory(width * block);
  i64 rows[block];
  const Base* const all = bases.all.data();
  const u64 low = (u64(1) << PLACE_BITS) - 1, places = (u64(1) << bases.bits) - 1;
  const i64 bits = bases.bits;
  auto base = [&](u64 entry) -> const Base& { return all[(entry & low) >> bits]; };
  auto fetch = [&](i64 i) { prefetch_gradient<PAIR>(base(entries[i]), i64(entries[i] & places), width); };
  for (i64 i = from; i < std::min(from + ahead, to); i++) fetch(i);
  for (i64 i = from; i < to;) {
    i64 count = 0;
    for (float* sum = memory.data(); i < to && count < block; sum += width) {
      const i64 row = rows[count++] = row_of(entries[i]);
      prefetch_state(u, table, row, width);
      for (bool first = true; i < to && row_of(entries[i]) == row; i++, first = false) {
        fetch(std::min(i + ahead, to - 1));
        add_gradient<W, PAIR>(base(entries[i]), i64(entries[i] & places), sum, first, w);
      }
    }
    float* sum = memory.data();
    for (i64 k = 0; k < count; k++, sum += width) update_row<W>(u, table, rows[k], at++, sum, w);
  }
}

// Rows of one table, if they are few: they are summed where they lie and need no sorting.
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
  i64 at = u.rule == SPARSE_GRADIENT ? claim(u, known) : 0;
  for (i64 row = 0; row < reads.rows; row++)
    if (touched[row]) update_row<W>(u, table, reads.base + row, at++, sums.data() + row * width, w);
}

// Sorted entries [from, to): brings each row up to date.
template <int W>
static void settle_sorted(const Update& u, float* table, i64 w, const Bases&, const u64* entries, i64 from, i64 to, i64) {
  const i64 width = width_of<W>(w), ahead = 32;
  auto new_row = [&](i64 i) { return i == from || row_of(entries[i]) != row_of(entries[i - 1]); };
  for (i64 i = from; i < to; i++) {
    if (i + ahead < to && new_row(i + ahead)) prefetch_state(u, table, row_of(entries[i + ahead]), width);
    if (new_row(i)) catch_up<W>(u, table, row_of(entries[i]), u.step, w);
  }
}

// Rows [from, to) of a storage.
template <int W>
static void settle_range(const Update& u, float* table, i64 w, i64 from, i64 to) {
  for (i64 row = from; row < to; row++) catch_up<W>(u, table, row, u.step, w);
}

using Visit = void (*)(const Update&, float*, i64, const Bases&, const u64*, i64, i64, i64);

// What to do with the rows of a table: update them, or bring them up to date.
struct Visits {
  Visit update, settle;
  void (*update_few)(const Update&, float*, i64, const Bases&, const TableReads&, std::vector<float>&);
  void (*settle_all)(const Update&, float*, i64, i64, i64);
};

template <int W>
static Visits visits_of(bool pairs) {
  if (pairs) return {update_sorted<W, true>, settle_sorted<W>, update_few<W, true>, settle_range<W>};
  return {update_sorted<W, false>, settle_sorted<W>, update_few<W, false>, settle_range<W>};
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

// All rows of a storage.
static void settle_all(const Update& u, float* table, i64 width, i64 threads) {
  const auto settle = choose_visits(width).settle_all;
  const i64 piece = 4096;
  i64 next = 0;
  parallel(threads, [&](i64, i64) {
    for (i64 from; (from = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED)) < u.rows;)
      settle(u, table, width, from, std::min(from + piece, u.rows));
  });
}

// Visits the rows of one table in pieces that begin where a row does; whoever is free takes the next one.
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
      if (u.rule == SPARSE_GRADIENT) {
        i64 known = 0;
        for (i64 i = from; i < to; i++) known += i == from || row_of(entries[i]) != row_of(entries[i - 1]);
        place = claim(u, known);
      }
      visit(u, table, width, bases, entries, from, to, place);
    }
  });
}

// Tables side by side, one thread each; those that would keep one thread busy for longer than all others take all.
static void visit_rows(const Call& c, const std::vector<Source>& sources, const Bases& bases, const Update& u,
                       float* table, i64 width, bool settle, Scratch& scratch) {
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
      visit_table(u, t, table, width, bases, c.threads, settle ? visits.settle : visits.update);
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
      if (few && !settle) visits.update_few(u, table, width, bases, t, sums);
      else visit_table(u, t, table, width, bases, 1, settle ? visits.settle : visits.update);
    }
  });
}

// -- runs of elements -------------------------------------------------------------------------------------------------

// Entries into buckets, in order of occurrence: `count(add)` and `place(put)` walk the same entries of one thread.
template <class Entry>
struct Buckets {
  i64 number, total;
  std::vector<i64> starts;
  Entry* entries;

  template <class Walk>
  void fill(i64 threads, i64 lookups, Scratch& scratch, Walk&& walk) {
    std::vector<std::vector<i64>> counts(threads);
    parallel(threads, [&](i64 thread, i64 team) {
      for (i64 part = thread; part < threads; part += team) {
        counts[part].assign(number, 0);
        walk(lookups * part / threads, lookups * (part + 1) / threads,
             [&](i64 bucket, const Entry&) { counts[part][bucket]++; });
      }
    });
    starts.assign(number + 1, 0);
    total = 0;
    for (i64 b = 0; b < number; b++) {
      starts[b] = total;
      for (auto& own : counts) {
        const i64 here = own[b];
        own[b] = total;
        total += here;
      }
    }
    starts[number] = total;
    entries = static_cast<Entry*>(scratch.take(total * sizeof(Entry)));
    parallel(threads, [&](i64 thread, i64 team) {
      for (i64 part = thread; part < threads; part += team) {
        i64* at = counts[part].data();
        walk(lookups * part / threads, lookups * (part + 1) / threads,
             [&](i64 bucket, const Entry& entry) { entries[at[bucket]++] = entry; });
      }
    });
  }

  // fn(bucket, memory of the thread) for every bucket, whoever is free takes the next few.
  template <class Memory, class F>
  void each(i64 threads, F&& fn) {
    i64 next = 0;
    parallel(threads, [&](i64, i64) {
      Memory memory;
      for (i64 first; (first = __atomic_fetch_add(&next, 4, __ATOMIC_RELAXED)) < number;)
        for (i64 b = first; b < std::min(first + 4, number); b++)
          if (starts[b] < starts[b + 1]) fn(b, memory);
    });
  }
};

struct Piece {
  u32 first, offset;
  uint16_t length, tag;
};

struct ElementMemory {
  std::vector<float> sum;
  std::vector<u64> touched;
};

// Runs overlap, so they are cut where ranges of the array end, and each range is summed element by element.
static void update_elements(const Call& c, const std::vector<Source>& sources, const Bases& bases, const Update& u,
                            float* table, Scratch& scratch) {
  const i64 lookups = count_lookups(sources);
  i64 shift = 11;
  while (u.rows >> shift > 8192) shift++;
  const i64 range = i64(1) << shift;
  Buckets<Piece> buckets{(u.rows + range - 1) >> shift, 0, {}, nullptr};
  buckets.fill(c.threads, lookups, scratch, [&](i64 from, i64 to, auto&& put) {
    each_lookup(sources, from, to, [&](const Source& s, i64 b) {
      if (s.of[b] < 0) return;
      i64 at = s.of[b], left = s.run, offset = s.place(b) * bases.all[s.tag].stride;
      while (left) {
        const i64 end = std::min(s.base + s.rows, (at >> shift << shift) + range), length = std::min(left, end - at);
        put(at >> shift, Piece{u32(at), u32(offset), uint16_t(length), uint16_t(s.tag)});
        left -= length, offset += length, at += length;
        if (at == s.base + s.rows) at = s.base;
      }
    });
  });
  buckets.each<ElementMemory>(c.threads, [&](i64 b, ElementMemory& memory) {
    const i64 first = b << shift;
    memory.sum.assign(range, 0.f);
    memory.touched.assign(range / 64, 0);
    for (i64 i = buckets.starts[b]; i < buckets.starts[b + 1]; i++) {
      const Piece& piece = buckets.entries[i];
      const Base& base = bases.all[piece.tag];
      const float* __restrict g = base.gradient + piece.offset;
      float* __restrict sum = memory.sum.data() + (piece.first - first);
      for (i64 k = 0; k < piece.length; k++) sum[k] += base.factor * g[k];
      for (i64 k = 0, at = piece.first - first; k < piece.length;) {
        const i64 bit = (at + k) & 63, here = std::min<i64>(64 - bit, piece.length - k);
        memory.touched[(at + k) >> 6] |= (here == 64 ? ~u64(0) : (u64(1) << here) - 1) << bit;
        k += here;
      }
    }
    i64 known = 0;
    if (u.rule == SPARSE_GRADIENT)
      for (u64 word : memory.touched) known += bits_set(word);
    i64 place = u.rule == SPARSE_GRADIENT ? claim(u, known) : 0;
    for (i64 word = 0; word < range / 64; word++)
      for (u64 bits = memory.touched[word]; bits; bits &= bits - 1) {
        const i64 k = word * 64 + __builtin_ctzll(bits);
        update_row<1>(u, table, first + k, place++, memory.sum.data() + k, 1);
      }
  });
}

// -- gradients that depend on other values ----------------------------------------------------------------------------

// to[k] *= by[k] * factor; a single element of `by` stands for all.
static inline void multiply(float* to, const float* by, i64 elements, i64 span, float factor) {
  if (elements == span)
    blocks<0>(span, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(to + k) * (lanes.load(by + k) * factor)); });
  else
    blocks<0>(span, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(to + k) * (by[0] * factor)); });
}

// Gradients of a feature's rows and weights for n of its ids from the first-th on, from those of their vectors
// (rows of `out`) and what forward kept. `own` holds one matrix per probe and its weights: [probes][2].
static void own_gradients(const Call& c, const Feature& f, const Chunk& at, i64 first, i64 n, const Matrix& out,
                          const Matrix& saved, const Matrix* own, std::vector<float>& memory) {
  memory.resize(f.probes * n + f.width);
  float* here = memory.data() + f.probes * n;
  for (i64 j = 0; j < f.probes; j++)
    factors(c.probes[f.first + j], at.ids, nullptr, n, memory.data() + j * n);
  auto kept = [&](const Probe& p, i64 i) { return saved.data + (first + i) * saved.stride + p.kept; };
  auto weight = [&](const Probe& p, i64 i) { return p.weight_storage < 0 ? 1.f : kept(p, i)[p.run * p.width]; };
  auto signs = [&](const Probe& p, i64 i) {
    for (i64 k = 0; p.run > 1 && p.has_sign && k < p.span; k++) here[k] *= sign_of(at.ids[i], step_salt(p.sign, k));
  };
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    const i64 read = p.run * p.width;
    for (i64 i = 0; i < n; i++) {
      if (at.rows_of(j)[i] < 0) {
        if (p.weight_storage >= 0) own[2 * j + 1].data[(first + i) * own[2 * j + 1].stride] = 0.f;
        continue;
      }
      const float* g = out.data + i * out.stride + p.column;
      const float* row = kept(p, i);
      const float factor = memory[j * n + i], scalar = weight(p, i);
      blocks<0>(p.span, [&](auto lanes, i64 k) { lanes.store(here + k, lanes.load(g + k) * factor); });
      signs(p, i);
      for (i64 q = 0; p.product && q < f.probes; q++) {
        const Probe& other = c.probes[f.first + q];
        if (q == j || other.column != p.column || at.rows_of(q)[i] < 0) continue;
        multiply(here, kept(other, i), other.run * other.width, p.span, memory[q * n + i] * weight(other, i));
        signs(other, i);
      }
      if (p.weight_storage >= 0) {
        float product = 0.f;
        for (i64 k = 0; k < p.span; k++) product += here[k] * row[k < read ? k : 0];
        own[2 * j + 1].data[(first + i) * own[2 * j + 1].stride] = product;
      }
      float* to = own[2 * j].data + (first + i) * own[2 * j].stride;
      if (read == p.span) {
        blocks<0>(read, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(here + k) * scalar); });
      } else {
        to[0] = 0.f;
        for (i64 k = 0; k < p.span; k++) to[0] += here[k] * scalar;
      }
    }
  }
}

// Whether the gradients of a feature's rows are those of its vectors times the one other row that forward kept.
static bool is_pair(const Call& c, const Feature& f) {
  if (f.plain || f.probes != 2 || c.offsets) return false;
  const Probe *a = c.probes + f.first, *b = a + 1;
  auto bare = [&](const Probe& p) { return p.run == 1 && p.span == p.width && p.product && !has_factor(p); };
  return bare(*a) && bare(*b) && a->column == b->column && a->width == b->width;
}

// -- a whole backward -------------------------------------------------------------------------------------------------

// Reads of each storage by all features, and where the gradients of each lie.
struct Reads {
  std::vector<std::vector<Source>> sources;
  Bases bases;
  std::vector<Matrix> own;    // per probe: of its rows and of its weights, where these are not those of the vectors
  std::vector<Matrix> ids;    // per feature: of its ids' vectors, where bags spread theirs in parts
  std::vector<i32*> rows;     // per probe: of its rows and of its weights
  std::vector<i32*> bags;     // per feature: of its ids, where gradients are those of the bags
};

// Whether the gradient of a bag is that of each of its vectors.
static bool is_shared(const Call& c, const Feature& f) { return f.plain && !f.mean && !c.sample_weights; }

static Outcome plan_reads(const Call& c, Scratch& scratch, Reads& reads) {
  reads.sources.resize(c.storage_count);
  reads.own.assign(2 * c.probe_count, Matrix{nullptr, 0});
  reads.ids.assign(c.feature_count, Matrix{nullptr, 0});
  reads.rows.assign(2 * c.probe_count, nullptr);
  reads.bags.assign(c.feature_count, nullptr);
  auto tag_of = [&](const Base& base) {
    reads.bases.all.push_back(base);
    return i64(reads.bases.all.size()) - 1;
  };
  // Where rows are only brought up to date there are no gradients.
  auto moved = [](const float* from, i64 elements) { return from ? from + elements : from; };
  // Columns that a feature's ids need of their own.
  auto width_of = [&](const Feature& f) {
    i64 width = f.plain && c.offsets && !is_shared(c, f) ? f.width : 0;
    for (i64 j = f.first; !f.plain && !is_pair(c, f) && j < f.first + f.probes; j++)
      width += c.probes[j].run * c.probes[j].width + (c.probes[j].weight_storage >= 0);
    return width;
  };
  i64 elements = 0;
  for (i64 f = 0; f < c.feature_count; f++) elements += width_of(c.features[f]) * count_ids(c, c.features[f]);
  i64 largest = elements, last = c.batch;
  for (i64 o = 0; o < c.output_count; o++) largest = std::max(largest, c.batch * c.outputs[o].stride);
  for (i64 f = 0; f < c.feature_count; f++) last = std::max(last, count_ids(c, c.features[f]));
  if (largest >> 31) return TOO_LARGE;
  while (last >> reads.bases.bits) reads.bases.bits++;
  float* const temporary = static_cast<float*>(scratch.take(elements * sizeof(float)));
  float* next = temporary;
  for (i64 k = 0; k < c.feature_count; k++) {
    const Feature& f = c.features[k];
    const i64 count = count_ids(c, f), stride = width_of(f);
    float* column = next;
    next += stride * count;
    auto matrix = [&](i64 width) {
      const Matrix m{column, stride};
      column += width;
      return m;
    };
    auto rows = [&] { return static_cast<i32*>(scratch.take(count * sizeof(i32))); };
    if (c.offsets && is_shared(c, f)) reads.bags[k] = rows();
    else if (f.plain && c.offsets) reads.ids[k] = matrix(f.width);
    for (i64 j = f.first; j < f.first + f.probes; j++) {
      const Probe& p = c.probes[j];
      const Matrix& out = c.outputs[f.output];
      reads.rows[2 * j] = rows();
      Base base{moved(out.data, f.column + p.column), out.stride, float(p.scale), nullptr, 0};
      if (is_pair(c, f)) {
        const Probe& partner = c.probes[j == f.first ? j + 1 : f.first];
        base.other = moved(c.kept.data, partner.kept), base.other_stride = c.kept.stride;
      } else if (!f.plain || reads.ids[k].data) {
        reads.own[2 * j] = f.plain ? reads.ids[k] : matrix(p.run * p.width);
        base = {reads.own[2 * j].data + (f.plain ? p.column : 0), stride, f.plain ? float(p.scale) : 1.f, nullptr, 0};
      }
      reads.sources[p.storage].push_back({p.storage, p.run, p.base, p.rows, tag_of(base), count, reads.rows[2 * j], reads.bags[k]});
      if (p.weight_storage < 0) continue;
      reads.own[2 * j + 1] = matrix(1);
      reads.rows[2 * j + 1] = rows();
      const i64 tag = tag_of({reads.own[2 * j + 1].data, stride, 1.f, nullptr, 0});
      reads.sources[p.weight_storage].push_back({p.weight_storage, 1, p.weight_base, p.weight_rows, tag, count, reads.rows[2 * j + 1], nullptr});
    }
  }
  return i64(reads.bases.all.size()) >> std::min<i64>(16, PLACE_BITS - reads.bases.bits) ? TOO_LARGE : DONE;
}

// Pieces of the ids of samples [from, to), as workspaces take them: fn(feature, first id, number).
template <class F>
static void each_piece(const Call& c, i64 from, i64 to, i64 size, F&& fn) {
  if (c.offsets) {
    for (i64 k = 0; k < c.feature_count; k++) {
      const i64 last = first_id(c, c.features[k], to);
      for (i64 at = first_id(c, c.features[k], from); at < last; at += size) fn(k, at, std::min(size, last - at));
    }
    return;
  }
  for (i64 at = from; at < to; at += size)
    for (i64 k = 0; k < c.feature_count; k++) fn(k, at, std::min(size, to - at));
}

// Rows of all reads and, on request, gradients that are not those of the output; false where an id is out of range.
static bool find_reads(const Call& c, const Reads& reads, bool gradients) {
  bool good = true;
  const std::vector<Matrix> kept = kept_of(c);
  parallel(c.threads, [&](i64 thread, i64 team) {
    const Workspace work(c, c.batch);
    std::vector<float> memory, vectors;
    each_piece(c, c.batch * thread / team, c.batch * (thread + 1) / team, work.size(), [&](i64 k, i64 at, i64 n) {
      const Feature& f = c.features[k];
      const Chunk chunk = work.chunk(c.features, k);
      const i64 place = at - first_id(c, f, 0) * (c.offsets != nullptr);
      if (!find(c, f, at, n, chunk)) __atomic_store_n(&good, false, __ATOMIC_RELAXED);
      for (i64 j = 0; j < f.probes; j++) {
        i32* const* to_rows = &reads.rows[2 * (f.first + j)];
        std::memcpy(to_rows[0] + place, chunk.rows_of(j), n * sizeof(i32));
        if (to_rows[1]) std::memcpy(to_rows[1] + place, chunk.rows_of(j) + chunk.size, n * sizeof(i32));
      }
      if (reads.bags[k]) {
        BagWalk walk(c, f, at);
        for (i64 i = 0; i < n; i++) reads.bags[k][place + i] = i32(walk.bag_of(at + i));
      }
      if (!gradients || is_shared(c, f) || (f.plain && !c.offsets) || is_pair(c, f)) return;
      const Matrix& out = c.outputs[f.output];
      if (f.plain) return spread(c, f, at, n, reads.ids[k].data + place * f.width);
      Matrix given{out.data + at * out.stride + f.column, out.stride};
      if (c.offsets) {
        vectors.resize(n * f.width);
        spread(c, f, at, n, vectors.data());
        given = {vectors.data(), f.width};
      }
      own_gradients(c, f, chunk, place, n, given, kept[k], &reads.own[2 * f.first], memory);
    });
  });
  return good;
}

// One step of every storage, or, where `settle`, all steps that the rows of the batch missed before it is read.
static int backward(const Call& c, const Update* updates, bool settle, Scratch& scratch) {
  Reads reads;
  const Outcome outcome = plan_reads(c, scratch, reads);
  if (outcome != DONE) return outcome;
  if (!find_reads(c, reads, !settle)) return OUT_OF_RANGE;
  for (i64 s = 0; s < c.storage_count; s++) {
    const std::vector<Source>& sources = reads.sources[s];
    if (sources.empty()) continue;
    bool runs = false;
    for (const Source& source : sources) runs |= source.run > 1;
    const i64 width = c.storage_widths[s];
    if (runs && settle) settle_all(updates[s], c.storages[s], width, c.threads);
    else if (runs) update_elements(c, sources, reads.bases, updates[s], c.storages[s], scratch);
    else visit_rows(c, sources, reads.bases, updates[s], c.storages[s], width, settle, scratch);
  }
  return DONE;
}
