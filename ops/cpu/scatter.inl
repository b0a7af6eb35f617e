// Gradients to rows: duplicates are summed in order of occurrence, then each row is updated once. Work is divided by
// row, not by thread, so results are the same bits for any number of threads. Part of kernels.inl.

// Where the gradients of one table read lie: element [b * stride + column] of a base, for sample b.
struct Source {
  i64 storage, run, base, rows;  // run > 1: consecutive elements of the table [base, base + rows)
  i64 tag, stride, column;
  const i32* of;                 // [batch] row, -1 for none
};

struct Base {
  const float* gradient;
  float factor;
};

constexpr i64 BASES = 8, OFFSET_BITS = 30;

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

// One step of the rule on a row whose summed gradient is g; `at` is the row's place in a sparse gradient.
template <int W>
static inline void update_row(const Update& u, float* table, i64 row, i64 at, const float* g, i64 w) {
  const i64 width = width_of<W>(w), first = row * width;
  const float lr = float(u.lr), eps = float(u.eps);
  float* weight = table + first;
  switch (u.rule) {
    case SGD:
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * lr); });
      break;
    case ADAGRAD: {
      float* sum = u.state[0] + first;
      blocks<W>(width, [&](auto lanes, i64 k) {
        const auto v = lanes.load(g + k), total = lanes.load(sum + k) + v * v;
        lanes.store(sum + k, total);
        lanes.store(weight + k, lanes.load(weight + k) - v / (lanes.root(total) + eps) * lr);
      });
      break;
    }
    case ROWWISE_ADAGRAD: {
      const float step = lr / (std::sqrt(u.state[0][row] += mean_square<W>(g, w)) + eps);
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(weight + k, lanes.load(weight + k) - lanes.load(g + k) * step); });
      break;
    }
    case ADAM: {
      const float rest1 = float(1 - u.beta1), rest2 = float(1 - u.beta2), size = float(u.step_size);
      float* mean = u.state[0] + first;
      float* square = u.state[1] + first;
      blocks<W>(width, [&](auto lanes, i64 k) {
        const auto v = lanes.load(g + k);
        auto m = lanes.load(mean + k), s = lanes.load(square + k);
        m += (v - m) * rest1, s += (v * v - s) * rest2;
        lanes.store(mean + k, m), lanes.store(square + k, s);
        lanes.store(weight + k, lanes.load(weight + k) - m / (lanes.root(s) + eps) * size);
      });
      break;
    }
    case DENSE_GRADIENT:
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(u.gradient + first + k, lanes.load(g + k)); });
      break;
    default:
      u.touched[at] = row;
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(u.gradient + at * width + k, lanes.load(g + k)); });
  }
}

static inline void prefetch_state(const Update& u, const float* table, i64 row, i64 width) {
  if (u.rule < DENSE_GRADIENT) prefetch<1>(table + row * width, 4 * width);
  if (u.rule == ROWWISE_ADAGRAD) prefetch<1>(u.state[0] + row, 4);
  if (u.rule == ADAGRAD || u.rule == ADAM) prefetch<1>(u.state[0] + row * width, 4 * width);
  if (u.rule == ADAM) prefetch<1>(u.state[1] + row * width, 4 * width);
}

// Lookups [from, to) of all sources, numbered source after source: fn(source, sample).
template <class F>
static void each_lookup(const std::vector<Source>& sources, i64 batch, i64 from, i64 to, F&& fn) {
  for (i64 s = batch ? from / batch : 0; from < to; s++) {
    const i64 stop = std::min(to, (s + 1) * batch);
    for (; from < stop; from++) fn(sources[s], from - s * batch);
  }
}

// Places for `count` rows of a sparse gradient. Their order differs from run to run; whoever called sorts them.
static inline i64 claim(const Update& u, i64 count) { return __atomic_fetch_add(u.touched_count, count, __ATOMIC_RELAXED); }

// -- rows -------------------------------------------------------------------------------------------------------------

static inline u64 pack(i32 row, i64 tag, i64 offset) { return u64(row) << 33 | u64(tag) << OFFSET_BITS | u64(offset); }

static inline i64 row_of(u64 entry) { return i64(entry >> 33); }

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
static const u64* sorted_entries(const TableReads& table, i64 batch, i64 threads, i64& count) {
  const i64 lookups = batch * i64(table.sources.size());
  u64 *from = table.entries[0], *to = table.entries[1];
  std::vector<i64> filled(threads, 0);
  auto part = [&](i64 t) { return lookups * t / threads; };
  parallel(threads, [&](i64 thread, i64 team) {
    for (i64 t = thread; t < threads; t += team) {
      i64 at = part(t);
      each_lookup(table.sources, batch, part(t), part(t + 1), [&](const Source& s, i64 b) {
        from[at] = pack(s.of[b], s.tag, b * s.stride + s.column);
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
  const i64 passes = (bits + 8) / 9;
  for (i64 p = 0, shift = 0; p < passes; p++, std::swap(from, to)) {
    const i64 digit = (bits - shift + passes - p - 1) / (passes - p);
    sort_digit(from, to, count, table.base, shift, digit, threads);
    shift += digit;
  }
  return from;
}

// Sorted entries [from, to): sums each row's gradients and updates it; `at` is the first row's place in a sparse gradient.
template <int W>
static void update_sorted(const Update& u, float* table, i64 w, const Base* bases, const u64* entries, i64 from, i64 to,
                          i64 at) {
  const i64 width = width_of<W>(w), ahead = 32;
  const u64 mask = (u64(1) << OFFSET_BITS) - 1;
  float fixed[W ? W : 1];
  std::vector<float> memory(W ? 0 : width);
  float* sum = W ? fixed : memory.data();
  auto gradient = [&](u64 entry) { return bases[entry >> OFFSET_BITS & (BASES - 1)].gradient + (entry & mask); };
  auto fetch = [&](i64 i) {
    prefetch(gradient(entries[i]), 4 * width);
    if (i == from || row_of(entries[i]) != row_of(entries[i - 1])) prefetch_state(u, table, row_of(entries[i]), width);
  };
  for (i64 i = from; i < std::min(from + ahead, to); i++) fetch(i);
  for (i64 i = from; i < to; at++) {
    const i64 row = row_of(entries[i]);
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(sum + k, lanes.all(0.f)); });
    for (; i < to && row_of(entries[i]) == row; i++) {
      if (i + ahead < to) fetch(i + ahead);
      const float* g = gradient(entries[i]);
      const float factor = bases[entries[i] >> OFFSET_BITS & (BASES - 1)].factor;
      blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(sum + k, lanes.load(sum + k) + lanes.load(g + k) * factor); });
    }
    update_row<W>(u, table, row, at, sum, w);
  }
}

static auto choose_update(i64 width) {
  switch (width) {
    case 1: return update_sorted<1>;
    case 4: return update_sorted<4>;
    case 8: return update_sorted<8>;
    case 16: return update_sorted<16>;
    case 32: return update_sorted<32>;
    case 64: return update_sorted<64>;
    case 128: return update_sorted<128>;
    default: return update_sorted<0>;
  }
}

// Updates the rows of one table in pieces that begin where a row does; whoever is free takes the next one.
static void update_table(const Update& u, const TableReads& reads, float* table, i64 width, const Base* bases, i64 batch,
                         i64 threads) {
  i64 count = 0;
  const u64* entries = sorted_entries(reads, batch, threads, count);
  const i64 pieces = threads == 1 ? 1 : std::min<i64>(1 + count / 2048, 16 * threads);
  auto start = [&](i64 p) {
    i64 at = count * p / pieces;
    while (at && at < count && row_of(entries[at]) == row_of(entries[at - 1])) at++;
    return at;
  };
  const auto update = choose_update(width);
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
      update(u, table, width, bases, entries, from, to, place);
    }
  });
}

// Tables side by side, one thread each; those that would keep one thread busy for longer than all others take all.
static void update_rows(const Call& c, const std::vector<Source>& sources, const Base* bases, const Update& u,
                        float* table, i64 width, Scratch& scratch) {
  std::vector<TableReads> tables;
  for (const Source& s : sources) {
    auto same = [&](const TableReads& t) { return t.base == s.base; };
    auto found = std::find_if(tables.begin(), tables.end(), same);
    if (found == tables.end()) found = tables.insert(tables.end(), TableReads{s.base, s.rows, {}, {nullptr, nullptr}});
    found->sources.push_back(s);
  }
  std::vector<const TableReads*> narrow;
  for (TableReads& t : tables) {
    for (u64*& entries : t.entries)
      entries = static_cast<u64*>(scratch.take(c.batch * i64(t.sources.size()) * sizeof(u64)));
    if (c.threads > 1 && t.sources.size() * c.threads * 2 > sources.size())
      update_table(u, t, table, width, bases, c.batch, c.threads);
    else narrow.push_back(&t);
  }
  auto work = [](const TableReads* a, const TableReads* b) { return a->rows * i64(a->sources.size()) > b->rows * i64(b->sources.size()); };
  std::stable_sort(narrow.begin(), narrow.end(), work);
  i64 next = 0;
  parallel(c.threads, [&](i64, i64) {
    for (u64 i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < narrow.size();)
      update_table(u, *narrow[i], table, width, bases, c.batch, 1);
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
static void update_elements(const Call& c, const std::vector<Source>& sources, const Base* bases, const Update& u,
                            float* table, Scratch& scratch) {
  const i64 lookups = c.batch * i64(sources.size());
  i64 shift = 11;
  while (u.rows >> shift > 8192) shift++;
  const i64 range = i64(1) << shift;
  Buckets<Piece> buckets{(u.rows + range - 1) >> shift, 0, {}, nullptr};
  buckets.fill(c.threads, lookups, scratch, [&](i64 from, i64 to, auto&& put) {
    each_lookup(sources, c.batch, from, to, [&](const Source& s, i64 b) {
      if (s.of[b] < 0) return;
      i64 at = s.of[b], left = s.run, offset = b * s.stride + s.column;
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
      const Base& base = bases[piece.tag];
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

// Gradients of a feature's rows and weights for n ids, from what forward kept. `own` holds one matrix per probe and its
// weights: [probes][2].
static void own_gradients(const Call& c, const Feature& f, const Chunk& at, i64 first, i64 n, const Matrix* own,
                          std::vector<float>& memory) {
  const Matrix& out = c.outputs[f.output];
  memory.resize(f.probes * n + f.width);
  float* here = memory.data() + f.probes * n;
  for (i64 j = 0; j < f.probes; j++)
    if (!factors(c.probes[f.first + j], at.ids, nullptr, n, memory.data() + j * n)) std::fill_n(memory.data() + j * n, n, 1.f);
  auto kept = [&](const Probe& p, i64 i) { return c.kept.data + (first + i) * c.kept.stride + p.kept; };
  auto weight = [&](const Probe& p, i64 i) { return p.weight_storage < 0 ? 1.f : kept(p, i)[p.run * p.width]; };
  auto signs = [&](const Probe& p, i64 i) {
    for (i64 k = 0; p.run > 1 && p.has_sign && k < p.span; k++) here[k] *= sign_of(at.ids[i], step_salt(p.sign, k));
  };
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    const i64 read = p.run * p.width;
    for (i64 i = 0; i < n; i++) {
      if (at.rows_of(j)[i] < 0) continue;
      const float* g = out.data + (first + i) * out.stride + f.column + p.column;
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

// -- a whole backward -------------------------------------------------------------------------------------------------

static int backward(const Call& c, const Update* updates, Scratch& scratch) {
  std::vector<std::vector<Source>> sources(c.storage_count);
  std::vector<Base> bases;
  std::vector<Matrix> own(2 * c.probe_count, Matrix{nullptr, 0});
  std::vector<i32*> rows(2 * c.probe_count, nullptr);
  auto tag_of = [&](const float* gradient, float factor) {
    for (i64 i = 0; i < i64(bases.size()); i++)
      if (bases[i].gradient == gradient && bases[i].factor == factor) return i;
    bases.push_back({gradient, factor});
    return i64(bases.size()) - 1;
  };
  i64 elements = 0;
  for (i64 f = 0; f < c.feature_count; f++)
    for (i64 j = c.features[f].first; !c.features[f].plain && j < c.features[f].first + c.features[f].probes; j++)
      elements += c.probes[j].run * c.probes[j].width + (c.probes[j].weight_storage >= 0);
  if (elements * c.batch >> OFFSET_BITS) return TOO_LARGE;
  for (i64 o = 0; o < c.output_count; o++)
    if (c.batch * c.outputs[o].stride >> OFFSET_BITS) return TOO_LARGE;
  float* temporary = static_cast<float*>(scratch.take(elements * c.batch * sizeof(float)));
  i64 used = 0;
  auto matrix = [&](i64 width) {
    Matrix m{temporary + used, elements};
    used += width;
    return m;
  };
  for (i64 f = 0; f < c.feature_count; f++) {
    const Feature& feature = c.features[f];
    for (i64 j = feature.first; j < feature.first + feature.probes; j++) {
      const Probe& p = c.probes[j];
      const Matrix& out = c.outputs[feature.output];
      rows[2 * j] = static_cast<i32*>(scratch.take(c.batch * sizeof(i32)));
      Source s{p.storage, p.run, p.base, p.rows, 0, out.stride, feature.column + p.column, rows[2 * j]};
      if (feature.plain) {
        s.tag = tag_of(out.data, float(p.scale));
      } else {
        own[2 * j] = matrix(p.run * p.width);
        s.tag = tag_of(temporary, 1.f), s.stride = elements, s.column = own[2 * j].data - temporary;
      }
      sources[p.storage].push_back(s);
      if (p.weight_storage < 0) continue;
      own[2 * j + 1] = matrix(1);
      rows[2 * j + 1] = static_cast<i32*>(scratch.take(c.batch * sizeof(i32)));
      sources[p.weight_storage].push_back({p.weight_storage, 1, p.weight_base, p.weight_rows, s.tag, elements,
                                           own[2 * j + 1].data - temporary, rows[2 * j + 1]});
    }
  }
  if (i64(bases.size()) > BASES) return TOO_LARGE;
  bool good = true;
  parallel(c.threads, [&](i64 thread, i64 team) {
    const Workspace work(c, 1);
    std::vector<float> memory;
    const i64 from = c.batch * thread / team, to = c.batch * (thread + 1) / team;
    for (i64 first = from; first < to; first += work.size()) {
      const i64 n = std::min(work.size(), to - first);
      for (i64 f = 0; f < c.feature_count; f++) {
        const Feature& feature = c.features[f];
        const Chunk chunk = work.chunk(c.features, f, 0);
        if (!find(c, feature, first, n, chunk)) __atomic_store_n(&good, false, __ATOMIC_RELAXED);
        for (i64 j = 0; j < feature.probes; j++) {
          i32* const* to_rows = &rows[2 * (feature.first + j)];
          std::memcpy(to_rows[0] + first, chunk.rows_of(j), n * sizeof(i32));
          if (to_rows[1]) std::memcpy(to_rows[1] + first, chunk.rows_of(j) + chunk.size, n * sizeof(i32));
        }
        if (!feature.plain) own_gradients(c, feature, chunk, first, n, &own[2 * feature.first], memory);
      }
    }
  });
  if (!good) return OUT_OF_RANGE;
  for (i64 s = 0; s < c.storage_count; s++) {
    if (sources[s].empty()) continue;
    bool runs = false;
    for (const Source& source : sources[s]) runs |= source.run > 1;
    if (runs) update_elements(c, sources[s], bases.data(), updates[s], c.storages[s], scratch);
    else update_rows(c, sources[s], bases.data(), updates[s], c.storages[s], c.storage_widths[s], scratch);
  }
  return DONE;
}
