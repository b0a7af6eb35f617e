// Backward: locates the gradients of all row lookups, then makes one step of every storage. Part of kernels.inl.

// to[k] *= by[k] * factor; a `by` of one element is broadcast.
static inline void multiply(float* to, const float* by, i64 elements, i64 span, float factor) {
  if (elements == span)
    blocks<0>(span, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(to + k) * (lanes.load(by + k) * factor)); });
  else
    blocks<0>(span, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(to + k) * (by[0] * factor)); });
}

// Gradients of a feature's rows and weights for n ids from `first` on, from those of their vectors (rows of `out`) and
// the values forward saved. `own` holds two matrices per row lookup, for its rows and its weights.
static void own_gradients(const Call& c, const Feature& f, const Chunk& at, i64 first, i64 n, const Matrix& out,
                          const Matrix& saved, const Matrix* own, std::vector<float>& memory) {
  memory.resize(f.row_lookups * n + f.width);
  float* here = memory.data() + f.row_lookups * n;
  for (i64 j = 0; j < f.row_lookups; j++)
    factors(c.row_lookups[f.first + j], at.ids, nullptr, n, memory.data() + j * n);
  auto kept = [&](const RowLookup& p, i64 i) { return saved.data + (first + i) * saved.stride + p.kept; };
  auto weight = [&](const RowLookup& p, i64 i) { return p.weight_storage < 0 ? 1.f : kept(p, i)[p.num_rows * p.width]; };
  auto signs = [&](const RowLookup& p, i64 i) {
    for (i64 k = 0; p.num_rows > 1 && p.has_sign && k < p.span; k++) here[k] *= sign_of(at.ids[i], step_salt(p.sign, k));
  };
  for (i64 j = 0; j < f.row_lookups; j++) {
    const RowLookup& p = c.row_lookups[f.first + j];
    const i64 read = p.num_rows * p.width;
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
      for (i64 q = 0; p.product && q < f.row_lookups; q++) {
        const RowLookup& other = c.row_lookups[f.first + q];
        if (q == j || other.column != p.column || at.rows_of(q)[i] < 0) continue;
        multiply(here, kept(other, i), other.num_rows * other.width, p.span, memory[q * n + i] * weight(other, i));
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

// Whether a feature is a product of two rows: the gradient of each is that of the vector times the other, saved, row.
static bool is_pair(const Call& c, const Feature& f) {
  if (f.plain || f.row_lookups != 2 || c.offsets) return false;
  const RowLookup *a = c.row_lookups + f.first, *b = a + 1;
  auto bare = [&](const RowLookup& p) { return p.num_rows == 1 && p.span == p.width && p.product && !has_factor(p); };
  return bare(*a) && bare(*b) && a->column == b->column && a->width == b->width;
}

// Row lookups of each storage by all features, and where their gradients are.
struct Reads {
  std::vector<std::vector<Source>> sources;
  Bases bases;
  std::vector<Matrix> own;    // per row lookup: of its rows and of its weights, unless those of the vectors serve
  std::vector<Matrix> ids;    // per feature: of its ids' vectors, if ids of a bag differ in their factor
  std::vector<i32*> rows;     // per row lookup: of its rows and of its weights
  std::vector<i32*> bags;     // per feature: bag of each id, if ids take the gradient of their bag
};

// Whether each vector of a bag has the gradient of the bag.
static bool is_shared(const Call& c, const Feature& f) { return f.plain && !f.mean && !c.sample_weights; }

static Outcome plan_reads(const Call& c, Scratch& scratch, Reads& reads) {
  reads.sources.resize(c.storage_count);
  reads.own.assign(2 * c.row_lookup_count, Matrix{nullptr, 0});
  reads.ids.assign(c.feature_count, Matrix{nullptr, 0});
  reads.rows.assign(2 * c.row_lookup_count, nullptr);
  reads.bags.assign(c.feature_count, nullptr);
  auto tag_of = [&](const Base& base) {
    reads.bases.push_back(base);
    return i64(reads.bases.size()) - 1;
  };
  // Without gradients, when only deferred steps are applied.
  auto moved = [](const float* from, i64 elements) { return from ? from + elements : from; };
  // Columns of temporary gradients per id of a feature.
  auto width_of = [&](const Feature& f) {
    i64 width = f.plain && c.offsets && !is_shared(c, f) ? f.width : 0;
    for (i64 j = f.first; !f.plain && !is_pair(c, f) && j < f.first + f.row_lookups; j++)
      width += c.row_lookups[j].num_rows * c.row_lookups[j].width + (c.row_lookups[j].weight_storage >= 0);
    return width;
  };
  i64 elements = 0;
  for (i64 f = 0; f < c.feature_count; f++) elements += width_of(c.features[f]) * count_ids(c, c.features[f]);
  i64 largest = elements, lookups = 0;
  for (i64 o = 0; o < c.output_count; o++) largest = std::max(largest, c.batch * c.outputs[o].stride);
  for (i64 f = 0; f < c.feature_count; f++) lookups += 2 * c.features[f].row_lookups * count_ids(c, c.features[f]);
  // Marks number the sums of shared rows by 29 bits.
  if (largest >> 31 || lookups >> 30) return TOO_LARGE;
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
    for (i64 j = f.first; j < f.first + f.row_lookups; j++) {
      const RowLookup& p = c.row_lookups[j];
      const Matrix& out = c.outputs[f.output];
      reads.rows[2 * j] = rows();
      Base base{moved(out.data, f.column + p.column), out.stride, float(p.scale), nullptr, 0};
      if (is_pair(c, f)) {
        const RowLookup& partner = c.row_lookups[j == f.first ? j + 1 : f.first];
        base.other = moved(c.kept.data, partner.kept), base.other_stride = c.kept.stride;
      } else if (!f.plain || reads.ids[k].data) {
        reads.own[2 * j] = f.plain ? reads.ids[k] : matrix(p.num_rows * p.width);
        base = {reads.own[2 * j].data + (f.plain ? p.column : 0), stride, f.plain ? float(p.scale) : 1.f, nullptr, 0};
      }
      reads.sources[p.storage].push_back({p.storage, p.num_rows, p.base, p.rows, tag_of(base), count, reads.rows[2 * j], reads.bags[k]});
      if (p.weight_storage < 0) continue;
      reads.own[2 * j + 1] = matrix(1);
      reads.rows[2 * j + 1] = rows();
      const i64 tag = tag_of({reads.own[2 * j + 1].data, stride, 1.f, nullptr, 0});
      reads.sources[p.weight_storage].push_back({p.weight_storage, 1, p.weight_base, p.weight_rows, tag, count, reads.rows[2 * j + 1], nullptr});
    }
  }
  return i64(reads.bases.size()) >> 16 ? TOO_LARGE : DONE;
}

// Calls fn(feature, first id, count) for pieces of at most `size` ids of samples [from, to).
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

// Rows of all row lookups and, on request, the temporary gradients; false if an id is out of range.
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
      for (i64 j = 0; j < f.row_lookups; j++) {
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

// One step of every storage; with `catch_up`, only the deferred steps of the batch's rows, before forward reads them.
static int backward(const Call& c, const Update* updates, bool catch_up, Scratch& scratch) {
  Reads reads;
  const Outcome outcome = plan_reads(c, scratch, reads);
  if (outcome != DONE) return outcome;
  if (!find_reads(c, reads, !catch_up)) return OUT_OF_RANGE;
  for (i64 s = 0; s < c.storage_count; s++) {
    const std::vector<Source>& sources = reads.sources[s];
    if (sources.empty() || updates[s].rule.number == NO_UPDATE) continue;
    bool slices = false;
    for (const Source& source : sources) slices |= source.num_rows > 1;
    const i64 width = c.storage_widths[s];
    if (slices && catch_up) catch_up_rows(updates[s], c.storages[s], width, c.threads, nullptr, 0);
    else if (slices) update_elements(c, sources, reads.bases, updates[s], c.storages[s], scratch);
    else if (catch_up) catch_up_tables(c, sources, updates[s], c.storages[s], width, scratch);
    else update_tables(c, sources, reads.bases, updates[s], c.storages[s], width, scratch);
  }
  return DONE;
}
