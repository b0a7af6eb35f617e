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

// Whether the vector is an unchanged row of one table, so that pooling can read the table without a copy.
static bool is_bare(const Call& c, const Feature& f) {
  const RowLookup& p = c.row_lookups[f.first];
  return kind_of(c, p.storage) == FP32 && f.row_lookups == 1 && p.num_rows == 1 && p.span == p.width && p.scale == 1.0 && !p.has_sign && p.weight_storage < 0;
}

// out[bag] += vector * factor for n ids from `at` on. With `rows`, `vectors` is the table and -1 means no row.
template <int W>
static void pool(BagWalk& walk, i64 at, i64 n, const float* vectors, const i32* rows, i64 w, float* out, i64 stride) {
  const i64 width = width_of<W>(w);
  for (i64 i = 0; i < n; i++) {
    float* o = out + walk.bag_of(at + i) * stride;
    if (rows && i + 8 < n) prefetch(vectors + i64(std::max(rows[i + 8], 0)) * width, 4 * width);
    if (rows && rows[i] < 0) continue;
    const float* q = vectors + (rows ? i64(rows[i]) : i) * width;
    const float factor = walk.factor(at + i);
    blocks<W>(width, [&](auto lanes, i64 k) { lanes.store(o + k, lanes.load(o + k) + lanes.load(q + k) * factor); });
  }
}

static auto choose_pool(i64 width) {
  switch (width) {
    case 1: return pool<1>;
    case 4: return pool<4>;
    case 8: return pool<8>;
    case 16: return pool<16>;
    case 32: return pool<32>;
    case 64: return pool<64>;
    case 128: return pool<128>;
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
    for (i64 b = from; b < to; b++) std::memset(out + b * matrix.stride, 0, f.width * sizeof(float));
    const i64 first = first_id(c, f, from), last = first_id(c, f, to), start = first_id(c, f, 0);
    if (first == last) continue;
    const bool bare = is_bare(c, f);
    const i64 used = bare ? c.row_lookups[f.first].width : f.width;
    const auto add = choose_pool(used);
    if (!bare) memory.resize(work.size() * f.width);
    BagWalk walk(c, f, first);
    const Chunk chunk = work.chunk(c.features, k);
    Reader whole(c), rows(c);
    if (!bare) whole.vectors(f, chunk, 0, 0);
    if (c.kept.data && !f.plain) rows.rows(f, chunk, 0, 0);
    const float* vectors = bare ? c.storages[c.row_lookups[f.first].storage] : memory.data();
    for (i64 at = first; at < last; at += work.size()) {
      const i64 n = std::min(work.size(), last - at);
      good &= find(c, f, at, n, chunk);
      const Matrix here{memory.data(), f.width};
      Matrix kept_here = kept[k];
      if (kept_here.data) kept_here.data += (at - start) * kept_here.stride;
      whole.read(&here, n);
      rows.read(&kept_here, n);
      add(walk, at, n, vectors, bare ? chunk.rows_of(0) : nullptr, used, out, matrix.stride);
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
