// Vectors of ids: rows are found for a chunk of samples ahead of being read, so that they arrive meanwhile. Part of
// kernels.inl.

template <int WRITE = 0>
static inline void prefetch(const void* address, i64 bytes) {
#if defined(__GNUC__)
  for (i64 at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(address) + at, WRITE);
#endif
}

// Rows of one probe joined into `out`; absent ones count as `empty`. FACTOR: each row is first multiplied by factor[i].
template <int W, int J, bool FACTOR>
static void gather_rows(const float* table, const i32* rows, const float* factor, float empty, i64 n, i64 w, float* out,
                        i64 stride) {
  const i64 width = width_of<W>(w);
  for (i64 i = 0; i < n; i++) {
    float* o = out + i * stride;
    if (rows[i] < 0) {
      if (J == STORE) for (i64 k = 0; k < width; k++) o[k] = empty;
      continue;
    }
    const float* q = table + i64(rows[i]) * width;
    const float f = FACTOR ? factor[i] : 1.f;
    blocks<W>(width, [&](auto lanes, i64 k) {
      auto v = lanes.load(q + k);
      if (FACTOR) v *= f;
      if (J == ADD) v = lanes.load(o + k) + v;
      if (J == MUL) v = lanes.load(o + k) * v;
      lanes.store(o + k, v);
    });
  }
}

using Gather = void (*)(const float*, const i32*, const float*, float, i64, i64, float*, i64);

template <int W>
static Gather gather_of(i64 join, bool factor) {
  static const Gather known[3][2] = {{gather_rows<W, STORE, false>, gather_rows<W, STORE, true>},
                                     {gather_rows<W, ADD, false>, gather_rows<W, ADD, true>},
                                     {gather_rows<W, MUL, false>, gather_rows<W, MUL, true>}};
  return known[join][factor];
}

static Gather choose_gather(i64 width, i64 join, bool factor) {
  switch (width) {
    case 1: return gather_of<1>(join, factor);
    case 4: return gather_of<4>(join, factor);
    case 8: return gather_of<8>(join, factor);
    case 16: return gather_of<16>(join, factor);
    case 32: return gather_of<32>(join, factor);
    case 64: return gather_of<64>(join, factor);
    case 128: return gather_of<128>(join, factor);
    default: return gather_of<0>(join, factor);
  }
}

static inline float sign_of(i64 id, i64 salt) { return i64(splitmix(u64(id) ^ u64(salt))) < 0 ? -1.f : 1.f; }

static inline i64 step_salt(i64 salt, i64 step) { return i64(u64(salt) + u64(step) * 0x9E3779B97F4A7C15ull); }

// What each row of a probe is multiplied by, or null where that is nothing. Runs carry their signs themselves.
static const float* factors(const Probe& p, const i64* ids, const float* weights, i64 n, float* out) {
  const bool sign = p.has_sign && p.run == 1;
  if (p.scale == 1.0 && !sign && !weights) return nullptr;
  for (i64 i = 0; i < n; i++) out[i] = float(p.scale);
  if (sign)
    for (i64 i = 0; i < n; i++) out[i] *= sign_of(ids[i], p.sign);
  if (weights)
    for (i64 i = 0; i < n; i++) out[i] *= weights[i];
  return out;
}

static inline void join_into(float& out, float value, i64 join) {
  out = join == STORE ? value : join == ADD ? out + value : out * value;
}

#include "stored.inl"

// Learned scalars of n ids, or null where a probe has none.
static const float* weights_of(const Call& c, const Probe& p, const i32* rows, i64 n, float* out) {
  if (p.weight_storage < 0) return nullptr;
  const float* table = c.storages[p.weight_storage];
  const i64 kind = kind_of(c, p.weight_storage);
  for (i64 i = 0; i < n; i++) {
    out[i] = 0.f;
    if (rows[i] < 0) continue;
    if (kind == FP32) out[i] = table[rows[i]];
    else decode_row(kind, stored_row(c, p.weight_storage, rows[i]), 1, out + i);
  }
  return out;
}

// Runs of elements: they may pass the table's end, and each element may have a sign of its own.
static void gather_runs(const Call& c, const Probe& p, i64 join, const i64* ids, const i32* rows, const float* factor,
                        i64 n, float* out, i64 stride) {
  const float* table = c.storages[p.storage] + p.base;
  for (i64 i = 0; i < n; i++) {
    float* __restrict o = out + i * stride;
    if (rows[i] < 0) {
      for (i64 k = 0; k < p.run; k++) join_into(o[k], p.product, join);
      continue;
    }
    const i64 first = rows[i] - p.base, straight = std::min(p.run, p.rows - first);
    if (!factor && !p.has_sign && straight == p.run) {
      for (i64 k = 0; k < p.run; k++) join_into(o[k], table[first + k], join);
      continue;
    }
    const float f = factor ? factor[i] : 1.f;
    for (i64 k = 0; k < p.run; k++) {
      float v = table[k < straight ? first + k : first + k - p.rows] * f;
      if (p.has_sign) v *= sign_of(ids[i], step_salt(p.sign, k));
      join_into(o[k], v, join);
    }
  }
}

// Single elements repeated over the probe's columns.
static void gather_repeated(const float* table, const Probe& p, i64 join, const i32* rows, const float* factor, i64 n,
                            float* out, i64 stride) {
  for (i64 i = 0; i < n; i++) {
    float* o = out + i * stride;
    const float v = rows[i] < 0 ? float(p.product) : factor ? table[rows[i]] * factor[i] : table[rows[i]];
    for (i64 k = 0; k < p.span; k++) join_into(o[k], v, join);
  }
}

// A chunk of one feature's ids and where its probes find them: `rows` holds, per probe, `size` rows of its table and
// `size` rows of its weights.
struct Chunk {
  i64 size;
  i64* ids;
  unsigned char* none;
  i32* rows;

  const i32* rows_of(i64 probe) const { return rows + 2 * size * probe; }
};

// Chunks of all features for one thread; of bags, one feature's at a time.
class Workspace {
 public:
  Workspace(const Call& c, i64 copies) : features_(c.offsets ? 1 : c.feature_count), probes_(c.probe_count) {
    // Many features in short chunks, few in long ones: what is found ahead has to stay in the nearest cache.
    size_ = std::max<i64>(8, std::min<i64>(CHUNK, 768 / std::max<i64>(1, c.probe_count) / 8 * 8));
    if (c.offsets) size_ = BAG_CHUNK;
    const i64 ids = copies * features_ * size_, rows = 2 * copies * probes_ * size_;
    memory_.reset(new char[ids * 9 + rows * 4 + 8]);
    ids_ = reinterpret_cast<i64*>(memory_.get());
    rows_ = reinterpret_cast<i32*>(ids_ + ids);
    none_ = reinterpret_cast<unsigned char*>(rows_ + rows);
  }

  i64 size() const { return size_; }

  Chunk chunk(const Feature* all, i64 feature, i64 copy) const {
    const i64 at = (copy * features_ + (features_ == 1 ? 0 : feature)) * size_;
    return {size_, ids_ + at, none_ + at, rows_ + 2 * size_ * (copy * probes_ + all[feature].first)};
  }

 private:
  i64 features_, probes_, size_;
  std::unique_ptr<char[]> memory_;
  i64* ids_;
  i32* rows_;
  unsigned char* none_;
};

// Position of a feature's first id of a sample.
static inline i64 first_id(const Call& c, const Feature& f, i64 sample) {
  return c.offsets ? c.offsets[f.ids * c.batch + sample] : sample;
}

// Number of ids of a feature.
static inline i64 count_ids(const Call& c, const Feature& f) { return first_id(c, f, c.batch) - first_id(c, f, 0); }

// Ids [first, first + n) of a feature and the rows of all its probes; false if one lies outside its range.
static bool find(const Call& c, const Feature& f, i64 first, i64 n, const Chunk& at) {
  const i64 step = c.offsets ? 1 : c.sample_stride, from = first * step + (c.offsets ? 0 : f.ids * c.feature_stride);
  if (c.ids_are_32)
    for (i64 i = 0; i < n; i++) at.ids[i] = static_cast<const i32*>(c.ids)[from + i * step];
  else
    for (i64 i = 0; i < n; i++) at.ids[i] = static_cast<const i64*>(c.ids)[from + i * step];
  i64 wrong = 0;
  if (f.limit >= 0)
    for (i64 i = 0; i < n; i++) wrong |= u64(at.ids[i]) >= u64(f.limit);
  const unsigned char* none = f.optional ? at.none : nullptr;
  if (f.optional)
    for (i64 i = 0; i < n; i++) at.none[i] = at.ids[i] == -1;
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    i32* rows = at.rows + 2 * at.size * j;
    wrong |= !storage_rows(p.rows_of, c.index, p.base, p.rows, at.ids, n, none, rows);
    if (p.weight_storage >= 0)
      wrong |= !storage_rows(p.weight_of, c.index, p.weight_base, p.weight_rows, at.ids, n, none, rows + at.size);
  }
  return !wrong;
}

static void prefetch_rows(const Call& c, const Feature& f, i64 n, const Chunk& at) {
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    const i32* rows = at.rows_of(j);
    const float* table = c.storages[p.storage];
    const i64 row = c.storage_bytes ? c.storage_bytes[p.storage] : 4 * p.width, bytes = row * p.run;
    for (i64 i = 0; i < n; i++) prefetch(reinterpret_cast<const char*>(table) + i64(std::max(rows[i], 0)) * row, bytes);
    if (p.weight_storage >= 0 && kind_of(c, p.weight_storage) == FP32)
      for (i64 i = 0; i < n; i++) prefetch(c.storages[p.weight_storage] + std::max(rows[at.size + i], 0), 4);
  }
}

// A probe's values of n ids, joined into `out`.
static void read_probe(const Call& c, const Probe& p, i64 join, const Chunk& at, i64 j, i64 n, float* out, i64 stride) {
  float memory[CHUNK], weight_memory[CHUNK];
  const i32* rows = at.rows_of(j);
  const float* weights = weights_of(c, p, rows + at.size, n, weight_memory);
  const float* factor = factors(p, at.ids, weights, n, memory);
  const float* table = c.storages[p.storage];
  if (kind_of(c, p.storage) != FP32) gather_stored(c, p, join, at.ids, rows, factor, n, out, stride);
  else if (p.run > 1) gather_runs(c, p, join, at.ids, rows, factor, n, out, stride);
  else if (p.span != p.width) gather_repeated(table, p, join, rows, factor, n, out, stride);
  else choose_gather(p.width, join, factor != nullptr)(table, rows, factor, p.product, n, p.width, out, stride);
}

// What is kept of each feature: of its i-th id at data + i * stride + the probe's column.
static std::vector<Matrix> kept_of(const Call& c) {
  std::vector<Matrix> found(c.feature_count, c.kept);
  float* next = c.kept.data;
  for (i64 f = 0; c.offsets && next && f < c.feature_count; f++) {
    const Feature& feature = c.features[f];
    i64 width = 0;
    for (i64 j = 0; !feature.plain && j < feature.probes; j++) {
      const Probe& p = c.probes[feature.first + j];
      width += p.run * p.width + (p.weight_storage >= 0);
    }
    found[f] = {next - (feature.plain ? 0 : c.probes[feature.first].kept), width};
    next += width * count_ids(c, feature);
  }
  return found;
}

// Keeps what backward needs of a feature whose rows are multiplied with something: the tables may have moved on by then.
// `first` is the place of the first id among the feature's.
static void keep_rows(const Call& c, const Feature& f, const Chunk& at, i64 first, i64 n, const Matrix& kept) {
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    const i32* rows = at.rows_of(j);
    float* to = kept.data + first * kept.stride + p.kept;
    Probe bare = p;
    bare.has_sign = 0;
    if (p.run > 1) gather_runs(c, bare, STORE, at.ids, rows, nullptr, n, to, kept.stride);
    else choose_gather(p.width, STORE, false)(c.storages[p.storage], rows, nullptr, 0.f, n, p.width, to, kept.stride);
    float weights[CHUNK];
    if (weights_of(c, p, rows + at.size, n, weights))
      for (i64 i = 0; i < n; i++) to[i * kept.stride + p.run * p.width] = weights[i];
  }
}

// Combined vectors of n ids of a feature.
static void read_feature(const Call& c, const Feature& f, const Chunk& at, i64 n, float* out, i64 stride) {
  for (i64 j = 0; j < f.probes; j++) {
    const Probe& p = c.probes[f.first + j];
    read_probe(c, p, p.join, at, j, n, out + p.column, stride);
  }
  if (f.padding)
    for (i64 i = 0; i < n; i++) std::memset(out + i * stride + f.width - f.padding, 0, f.padding * sizeof(float));
  if (f.optional)
    for (i64 i = 0; i < n; i++)
      if (at.none[i]) std::memset(out + i * stride, 0, f.width * sizeof(float));
}

// Features read ids in strides, which no hardware sees coming.
static void prefetch_ids(const Call& c, i64 from, i64 to) {
  const i64 size = c.ids_are_32 ? 4 : 8;
  if (c.feature_stride != 1) return;
  for (i64 i = from; i < to; i++)
    prefetch(static_cast<const char*>(c.ids) + i * c.sample_stride * size, c.feature_count * size);
}

#include "bags.inl"

// Samples [from, to); false where some id or row was out of range. Rows are found one chunk ahead of being read.
static bool look_up(const Call& c, i64 from, i64 to) {
  if (c.offsets) return look_up_bags(c, from, to);
  const Workspace work(c, 2);
  bool good = true;
  auto prepare = [&](i64 at, i64 copy) {
    const i64 n = std::min(work.size(), to - at);
    prefetch_ids(c, at + n, std::min(to, at + n + work.size()));
    for (i64 f = 0; f < c.feature_count; f++) {
      const Chunk chunk = work.chunk(c.features, f, copy);
      good &= find(c, c.features[f], at, n, chunk);
      prefetch_rows(c, c.features[f], n, chunk);
    }
    // Features write in strides, which no hardware sees coming.
    for (i64 o = 0; o < c.output_count; o++)
      for (i64 i = at; i < at + n; i++) prefetch<1>(c.outputs[o].data + i * c.outputs[o].stride, 4 * c.outputs[o].stride);
  };
  i64 copy = 0;
  if (from < to) prepare(from, copy);
  for (i64 at = from; at < to; at += work.size(), copy ^= 1) {
    if (at + work.size() < to) prepare(at + work.size(), copy ^ 1);
    const i64 n = std::min(work.size(), to - at);
    for (i64 f = 0; f < c.feature_count; f++) {
      const Feature& feature = c.features[f];
      const Matrix& out = c.outputs[feature.output];
      const Chunk chunk = work.chunk(c.features, f, copy);
      read_feature(c, feature, chunk, n, out.data + at * out.stride + feature.column, out.stride);
      if (c.kept.data && !feature.plain) keep_rows(c, feature, chunk, at, n, c.kept);
    }
  }
  return good;
}
