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
  const i64 width = width_of<W>(w);
  float part[16] = {0.f};
  i64 k = 0;
  for (; k + 16 <= width; k += 16)
    for (i64 j = 0; j < 16; j++) part[j] += g[k + j] * g[k + j];
  for (i64 j = 0; k < width && j < 16; k++, j++) part[j] += g[k] * g[k];
  for (i64 half = 8; half; half /= 2)
    for (i64 j = 0; j < half; j++) part[j] += part[j + half];
  return part[0] / float(width);
}

// One step of the rule on a row whose summed gradient is g; `at` is the row's place in a sparse gradient.
template <int W>
static inline void update_row(const Update& u, float* table, i64 row, i64 at, const float* g, i64 w) {
  const i64 width = width_of<W>(w), first = row * width;
  const float lr = float(u.lr), eps = float(u.eps);
  float* __restrict weight = table + first;
  switch (u.rule) {
    case SGD:
      for (i64 k = 0; k < width; k++) weight[k] -= lr * g[k];
      break;
    case ADAGRAD: {
      float* __restrict sum = u.state[0] + first;
      for (i64 k = 0; k < width; k++) {
        sum[k] += g[k] * g[k];
        weight[k] -= lr * (g[k] / (std::sqrt(sum[k]) + eps));
      }
      break;
    }
    case ROWWISE_ADAGRAD: {
      const float step = lr / (std::sqrt(u.state[0][row] += mean_square<W>(g, w)) + eps);
      for (i64 k = 0; k < width; k++) weight[k] -= step * g[k];
      break;
    }
    case ADAM: {
      const float rest1 = float(1 - u.beta1), rest2 = float(1 - u.beta2), size = float(u.step_size);
      float* __restrict mean = u.state[0] + first;
      float* __restrict square = u.state[1] + first;
      for (i64 k = 0; k < width; k++) {
        mean[k] += rest1 * (g[k] - mean[k]);
        square[k] += rest2 * (g[k] * g[k] - square[k]);
        weight[k] -= size * (mean[k] / (std::sqrt(square[k]) + eps));
      }
      break;
    }
    case DENSE_GRADIENT:
      for (i64 k = 0; k < width; k++) u.gradient[first + k] = g[k];
      break;
    default:
      u.touched[at] = row;
      for (i64 k = 0; k < width; k++) u.gradient[at * width + k] = g[k];
  }
}

static inline void prefetch_state(const Update& u, const float* table, i64 row, i64 width) {
  if (u.rule < DENSE_GRADIENT) prefetch(table + row * width, 4 * width);
  if (u.rule == ROWWISE_ADAGRAD) prefetch(u.state[0] + row, 4);
  if (u.rule == ADAGRAD || u.rule == ADAM) prefetch(u.state[0] + row * width, 4 * width);
  if (u.rule == ADAM) prefetch(u.state[1] + row * width, 4 * width);
}

// Places for `count` rows of a sparse gradient. Their order differs from run to run; whoever called sorts them.
static inline i64 claim(const Update& u, i64 count) {
  return u.rule == SPARSE_GRADIENT ? __atomic_fetch_add(u.touched_count, count, __ATOMIC_RELAXED) : 0;
}

// -- rows -------------------------------------------------------------------------------------------------------------

static inline u64 pack(i32 row, i64 tag, i64 offset) { return u64(row) << 33 | u64(tag) << OFFSET_BITS | u64(offset); }

static inline i64 bucket_of(i32 row, i64 bits) { return bits ? i64(u64(row) * 0x9E3779B97F4A7C15ull >> (64 - bits)) : 0; }

// Lists of equal rows within a bucket, found with a hash map that stays in the nearest cache.
struct Lists {
  std::vector<u32> slots, next, head, tail;

  i64 build(const u64* entries, i64 count) {
    u64 capacity = 64;
    while (capacity < u64(count) * 2) capacity *= 2;
    slots.assign(capacity, NONE);
    if (i64(next.size()) < count) next.resize(count), head.resize(count), tail.resize(count);
    const int shift = 64 - __builtin_ctzll(capacity);
    i64 known = 0;
    for (i64 i = 0; i < count; i++) {
      const u64 row = entries[i] >> 33;
      next[i] = NONE;
      for (u64 at = row * 0xD1342543DE82EF95ull >> shift;; at = (at + 1) & (capacity - 1)) {
        const u32 list = slots[at];
        if (list == NONE) {
          slots[at] = u32(known);
          head[known] = tail[known] = u32(i);
          known++;
          break;
        }
        if (entries[head[list]] >> 33 == row) {
          next[tail[list]] = u32(i);
          tail[list] = u32(i);
          break;
        }
      }
    }
    return known;
  }

  static constexpr u32 NONE = 0xFFFFFFFFu;
};

template <int W>
static void update_bucket(const Update& u, float* table, i64 w, const Base* bases, const u64* entries, i64 count,
                          Lists& lists, std::vector<float>& memory) {
  const i64 width = width_of<W>(w), ahead = 8;
  const u64 mask = (u64(1) << OFFSET_BITS) - 1;
  float fixed[W ? W : 1];
  if (!W && i64(memory.size()) < width) memory.resize(width);
  float* __restrict sum = W ? fixed : memory.data();
  const i64 known = lists.build(entries, count), place = claim(u, known);
  auto gradient = [&](u64 entry) { return bases[entry >> OFFSET_BITS & (BASES - 1)].gradient + (entry & mask); };
  for (i64 list = 0; list < known; list++) {
    if (list + ahead < known) {
      const u64 entry = entries[lists.head[list + ahead]];
      prefetch_state(u, table, i64(entry >> 33), width);
      prefetch(gradient(entry), 4 * width);
    }
    for (i64 k = 0; k < width; k++) sum[k] = 0.f;
    for (u32 i = lists.head[list]; i != Lists::NONE; i = lists.next[i]) {
      const u32 following = lists.next[i];
      if (following != Lists::NONE) prefetch(gradient(entries[following]), 4 * width);
      const float* __restrict g = gradient(entries[i]);
      const float factor = bases[entries[i] >> OFFSET_BITS & (BASES - 1)].factor;
      for (i64 k = 0; k < width; k++) sum[k] += factor * g[k];
    }
    update_row<W>(u, table, i64(entries[lists.head[list]] >> 33), place + list, sum, w);
  }
}

static auto choose_update(i64 width) {
  switch (width) {
    case 1: return update_bucket<1>;
    case 4: return update_bucket<4>;
    case 8: return update_bucket<8>;
    case 16: return update_bucket<16>;
    case 32: return update_bucket<32>;
    case 64: return update_bucket<64>;
    case 128: return update_bucket<128>;
    default: return update_bucket<0>;
  }
}

// Lookups [from, to) of all sources, numbered source after source: fn(source, sample).
template <class F>
static void each_lookup(const std::vector<Source>& sources, i64 batch, i64 from, i64 to, F&& fn) {
  for (i64 s = batch ? from / batch : 0; from < to; s++) {
    const i64 stop = std::min(to, (s + 1) * batch);
    for (; from < stop; from++) fn(sources[s], from - s * batch);
  }
}

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

struct RowMemory {
  Lists lists;
  std::vector<float> sum;
};

static void update_rows(const Call& c, const std::vector<Source>& sources, const Base* bases, const Update& u,
                        float* table, i64 width, Scratch& scratch) {
  const i64 lookups = c.batch * i64(sources.size());
  i64 bits = 0;
  while (bits < 12 && lookups >> bits > 512) bits++;
  Buckets<u64> buckets{i64(1) << bits, 0, {}, nullptr};
  buckets.fill(c.threads, lookups, scratch, [&](i64 from, i64 to, auto&& put) {
    each_lookup(sources, c.batch, from, to, [&](const Source& s, i64 b) {
      if (s.of[b] >= 0) put(bucket_of(s.of[b], bits), pack(s.of[b], s.tag, b * s.stride + s.column));
    });
  });
  const auto update = choose_update(width);
  buckets.each<RowMemory>(c.threads, [&](i64 b, RowMemory& memory) {
    update(u, table, width, bases, buckets.entries + buckets.starts[b], buckets.starts[b + 1] - buckets.starts[b],
           memory.lists, memory.sum);
  });
}

// -- runs of elements -------------------------------------------------------------------------------------------------

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
    i64 place = claim(u, known);
    for (i64 word = 0; word < range / 64; word++)
      for (u64 bits = memory.touched[word]; bits; bits &= bits - 1) {
        const i64 k = word * 64 + __builtin_ctzll(bits);
        update_row<1>(u, table, first + k, place++, memory.sum.data() + k, 1);
      }
  });
}

// -- gradients that depend on other values ----------------------------------------------------------------------------

// Gradients of a feature's rows and weights for n ids, where rows are multiplied with something. `own` holds one matrix
// per probe and its weights: [probes][2].
static void own_gradients(const Call& c, const Feature& f, const Chunk& at, i64 first, i64 n, const Matrix* own,
                          std::vector<float>& memory) {
  const Matrix& out = c.outputs[f.output];
  memory.resize((f.width + 1) * n * (f.probes + 1));
  std::vector<float*> values(f.probes);
  float* free = memory.data();
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    values[j] = free;
    free += p.span * n;
    if (p.product) read_probe(c, p, STORE, at, j, n, values[j], p.span);
  }
  float factor[CHUNK];
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    const i32* rows = at.rows_of(j);
    const i64 read = p.run * p.width;
    Probe plain = p;
    plain.weight_storage = -1;
    const float* constant = factors(c, plain, at.ids, nullptr, n, factor);
    for (i64 i = 0; i < n; i++) {
      const float* g = out.data + (first + i) * out.stride + f.column + p.column;
      float* to = own[2 * j].data + (first + i) * own[2 * j].stride;
      float* weight_to = own[2 * j + 1].data + (first + i) * own[2 * j + 1].stride;
      if (rows[i] < 0) continue;
      const float weight = p.weight_storage < 0 ? 1.f : rows[at.size + i] < 0 ? 0.f : c.storages[p.weight_storage][rows[at.size + i]];
      const float scale = constant ? constant[i] : 1.f;
      const float* table = c.storages[p.storage];
      float product = 0.f, repeated = 0.f;
      for (i64 k = 0; k < p.span; k++) {
        float here = g[k];
        if (p.product)
          for (i64 q = 0; q < f.probes; q++)
            if (q != j && c.probes[f.first + q].column == p.column) here *= values[q][i * p.span + k];
        here *= scale;
        if (p.run > 1 && p.has_sign) here *= sign_of(at.ids[i], step_salt(p.sign, k));
        if (p.weight_storage >= 0) {
          const i64 element = k < read ? k : 0;
          const i64 run_at = rows[i] - p.base + element;
          const float value = p.run > 1 ? table[p.base + (run_at < p.rows ? run_at : run_at - p.rows)] : table[i64(rows[i]) * p.width + element];
          product += here * value;
        }
        if (read == p.span) to[k] = here * weight;
        else repeated += here * weight;
      }
      if (read != p.span) to[0] = repeated;
      if (p.weight_storage >= 0) weight_to[0] = product;
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
