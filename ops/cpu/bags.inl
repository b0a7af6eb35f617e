// Pools the vectors of a bag: the ids of one feature and sample, summed or averaged. Part of kernels.inl.

// Bag of each id of a feature, for ids visited in order from `at` on.
class BagWalk {
 public:
  BagWalk(const Call& c, const Feature& f, i64 at) : c_(c), f_(f), ends_(c.offsets + f.ids * c.batch + 1) {
    bag_ = std::upper_bound(ends_, ends_ + c.batch, at) - ends_;
    share_ = bag_ < c.batch ? share() : 0.f;
  }

  i64 bag_of(i64 at) {
    if (at >= ends_[bag_]) {
      while (at >= ends_[bag_]) bag_++;
      share_ = share();
    }
    return bag_;
  }

  // Factor of the vector of id `at`, whose bag the last call of bag_of found.
  float factor(i64 at) const { return c_.sample_weights ? share_ * c_.sample_weights[at] : share_; }

 private:
  // One over the number of ids in the bag, not counting -1 of optional features.
  float share() const {
    if (!f_.mean) return 1.f;
    const i64 from = ends_[bag_ - 1], to = ends_[bag_];
    i64 none = 0;
    for (i64 i = from; f_.optional && i < to; i++)
      none += (c_.ids_are_32 ? i64(static_cast<const i32*>(c_.ids)[i]) : static_cast<const i64*>(c_.ids)[i]) == -1;
    return to - from > none ? 1.f / float(to - from - none) : 0.f;
  }

  const Call& c_;
  const Feature& f_;
  const i64* ends_;
  i64 bag_;
  float share_;
};

// Whether the vector is a row of one table as it is stored, so that pooling can read the table without a copy.
static bool is_bare(const Call& c, const Feature& f) {
  const RowLookup& p = c.row_lookups[f.first];
  if (f.row_lookups != 1 || (c.kept.data && !f.plain) || (p.product && kind_of(c, p.storage) != FP32)) return false;
  return p.num_rows == 1 && p.span == p.width && p.scale == 1.0 && !p.has_sign && p.weight_storage < 0;
}

// Rows of the ids of one feature, in order, a window of them at a time.
class RowWindow {
 public:
  static constexpr i64 AHEAD = 32;

  RowWindow(const Call& c, const Feature& f, i64 last) : c_(c), f_(f), last_(last), table_(stored_row(c, storage(), 0)), bytes_(row_bytes(c, storage())) {}

  i64 end() const { return end_; }
  bool good() const { return good_; }

  // Finds the rows of the ids from `first` on.
  void move(i64 first) {
    end_ = std::min(last_, first + SIZE);
    i64 ids[CHUNK];
    for (i64 at = first; at < end_; at += CHUNK) {
      const i64 n = std::min(end_ - at, CHUNK);
      Chunk chunk{CHUNK, ids, none_, rows_ + (at - first)};
      if (c_.ids_are_32) take_ids(c_, f_, at, n, chunk);
      else chunk.ids = const_cast<i64*>(static_cast<const i64*>(c_.ids)) + at;
      good_ &= find_rows(c_, f_, n, chunk);
    }
    std::fill_n(rows_ + (end_ - first), AHEAD, -1);
    first_ = rows_ - first;
    for (i64 i = first; i < std::min(first + AHEAD, end_); i++) fetch(i);
  }

  // The row of an id within the window; null: none. Prefetches the one AHEAD, into the L2 cache: that of wide rows can
  // wait for more lines at once than L1.
  inline const unsigned char* at(i64 i) const {
    fetch(i + AHEAD);
    return first_[i] < 0 ? nullptr : table_ + i64(first_[i]) * bytes_;
  }

 private:
  static constexpr i64 SIZE = 4 * CHUNK;

  i64 storage() const { return c_.row_lookups[f_.first].storage; }

  inline void fetch(i64 i) const {
    const unsigned char* row = table_ + i64(first_[i]) * bytes_;  // of -1 before the table, which a prefetch ignores
    prefetch<2>(row, bytes_);
    prefetch<2>(row + bytes_ - 1, 1);
  }

  const Call& c_;
  const Feature& f_;
  i64 last_, end_ = -1;
  const unsigned char* table_;
  i64 bytes_;
  bool good_ = true;
  const i32* first_ = nullptr;
  unsigned char none_[CHUNK];
  i32 rows_[SIZE + AHEAD];
};

// Sums of the rows of bags [from, to), in registers of N columns. Each bag is written once.
template <i64 KIND, int W>
static bool pool_rows(const Call& c, const Feature& f, i64 from, i64 to, float* out, i64 stride) {
  constexpr int N = W % WIDEST_BLOCK ? 8 : WIDEST_BLOCK;
  typedef Lanes<N> L;
  const i64* const ends = c.offsets + f.ids * c.batch + 1;
  RowWindow rows(c, f, ends[to - 1]);
  const float step = step_of(c, c.row_lookups[f.first].storage);
  for (i64 b = from, i = ends[from - 1]; b < to; b++) {
    float* const o = out + b * stride;
    typename L::V sums[W / N];
    for (int t = 0; t < W / N; t++) sums[t] = L::all(0.f);
    while (i < ends[b]) {
      if (i >= rows.end()) rows.move(i);
      const i64 stop = std::min(ends[b], rows.end());
      for (; i < stop; i++) {
        const unsigned char* row = rows.at(i);
        if (!row) continue;
        const Line line = line_at<KIND>(row, step);
        for (int t = 0; t < W / N; t++) sums[t] += decoded<KIND, N>(row, t * N, line);
      }
    }
    for (int t = 0; t < W / N; t++) L::store(o + t * N, sums[t]);
  }
  return rows.good();
}

// As pool_rows, of any width, and with factors of ids: sums are added up where they are written.
template <i64 KIND>
static bool pool_rows_with_factors(const Call& c, const Feature& f, i64 from, i64 to, float* out, i64 stride) {
  const i64 width = c.row_lookups[f.first].width, *const ends = c.offsets + f.ids * c.batch + 1;
  RowWindow rows(c, f, ends[to - 1]);
  const float step = step_of(c, c.row_lookups[f.first].storage);
  BagWalk walk(c, f, ends[from - 1]);
  for (i64 b = from, i = ends[from - 1]; b < to; b++) {
    float* const o = out + b * stride;
    std::fill_n(o, width, 0.f);
    for (; i < ends[b]; i++) {
      if (i >= rows.end()) rows.move(i);
      const unsigned char* row = rows.at(i);
      walk.bag_of(i);
      const float factor = walk.factor(i);
      if (!row) continue;
      const Line line = line_at<KIND>(row, step);
      const auto add = [&](auto lanes, i64 k, auto v) { lanes.store(o + k, lanes.load(o + k) + v * factor); };
      if constexpr (KIND == FP32)
        blocks<0>(width, [&](auto lanes, i64 k) { add(lanes, k, lanes.load(reinterpret_cast<const float*>(row) + k)); });
      else each_block<KIND, 0>(row, width, line, add);
    }
  }
  return rows.good();
}

using PoolRows = bool (*)(const Call&, const Feature&, i64, i64, float*, i64);

template <i64 KIND>
static PoolRows pool_of(i64 width) {
#if RSE_FLOATS >= 8
  switch (width) {
    case 8: return pool_rows<KIND, compiled(8)>;
    case 16: return pool_rows<KIND, 16>;
    case 32: return pool_rows<KIND, compiled(32)>;
    case 64: return pool_rows<KIND, compiled(64)>;
    case 128: return pool_rows<KIND, compiled(128)>;
  }
#endif
  return pool_rows_with_factors<KIND>;
}

static PoolRows choose_pool_of_rows(const Call& c, const Feature& f) {
  const RowLookup& p = c.row_lookups[f.first];
  const i64 width = f.mean || c.sample_weights ? 0 : p.width;
  switch (kind_of(c, p.storage)) {
    case FP32: return pool_of<FP32>(width);
    case FP16: return pool_of<FP16>(width);
    case BF16: return pool_of<BF16>(width);
    case INT8: return pool_of<INT8>(width);
    case INT4: return pool_of<INT4>(width);
    case INT2: return pool_of<INT2>(width);
    case STEP_INT8: return pool_of<STEP_INT8>(width);
    case STEP_INT4: return pool_of<STEP_INT4>(width);
    default: return pool_of<FP8>(width);
  }
}

// out[bag] += vector * factor for n ids from `at` on.
template <int W>
static void pool(BagWalk& walk, i64 at, i64 n, const float* vectors, i64 w, float* out, i64 stride) {
  const i64 width = width_of<W>(w);
  for (i64 i = 0; i < n; i++) {
    float* o = out + walk.bag_of(at + i) * stride;
    const float* q = vectors + i * width;
    const float factor = walk.factor(at + i);
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(o + k, lanes.load(o + k) + lanes.load(q + k) * factor); });
  }
}

static auto choose_pool(i64 width) {
  switch (width) {
    case 1: return pool<compiled(1)>;
    case 4: return pool<compiled(4)>;
    case 8: return pool<compiled(8)>;
    case 16: return pool<16>;
    case 32: return pool<compiled(32)>;
    case 64: return pool<compiled(64)>;
    case 128: return pool<compiled(128)>;
    default: return pool<0>;
  }
}

// Bags of samples [from, to) of all features.
static bool look_up_bags(const Call& c, i64 from, i64 to) {
  const Workspace work(c, to - from);
  const std::vector<Matrix> kept = kept_of(c);
  std::vector<float> memory;
  bool good = true;
  for (i64 k = 0; k < c.feature_count; k++) {
    const Feature& f = c.features[k];
    const Matrix& matrix = c.outputs[f.output];
    float* out = matrix.data + f.column;
    if (is_bare(c, f)) {
      const i64 used = c.row_lookups[f.first].width;
      for (i64 b = from; used < f.width && b < to; b++) std::memset(out + b * matrix.stride + used, 0, (f.width - used) * sizeof(float));
      if (from < to) good &= choose_pool_of_rows(c, f)(c, f, from, to, out, matrix.stride);
      continue;
    }
    for (i64 b = from; b < to; b++) std::memset(out + b * matrix.stride, 0, f.width * sizeof(float));
    const i64 first = first_id(c, f, from), last = first_id(c, f, to), start = first_id(c, f, 0);
    if (first == last) continue;
    const auto add = choose_pool(f.width);
    memory.resize(work.size() * f.width);
    BagWalk walk(c, f, first);
    const Chunk chunk = work.chunk(c.features, k);
    Reader whole(c), rows(c);
    whole.vectors(f, chunk, 0, 0);
    if (c.kept.data && !f.plain) rows.rows(f, chunk, 0, 0);
    for (i64 at = first; at < last; at += work.size()) {
      const i64 n = std::min(work.size(), last - at);
      good &= find(c, f, at, n, chunk);
      const Matrix here{memory.data(), f.width};
      Matrix kept_here = kept[k];
      if (kept_here.data) kept_here.data += (at - start) * kept_here.stride;
      whole.read(&here, n);
      rows.read(&kept_here, n);
      add(walk, at, n, memory.data(), f.width, out, matrix.stride);
    }
  }
  return good;
}

// Gradients of n ids' vectors, from those of their bags: [n, width].
static void spread(const Call& c, const Feature& f, i64 at, i64 n, float* to) {
  const Matrix& out = c.outputs[f.output];
  BagWalk walk(c, f, at);
  for (i64 i = 0; i < n; i++, to += f.width) {
    const float* g = out.data + walk.bag_of(at + i) * out.stride + f.column;
    const float factor = walk.factor(at + i);
    blocks<0>(f.width, [&](auto lanes, i64 k) { lanes.store(to + k, lanes.load(g + k) * factor); });
  }
}
