// Lookups of a whole collection: groups row lookups of one shape and runs all samples of a thread. Part of kernels.inl.

// Learned scalars of n ids; null if the row lookup has none.
static const float* weights_of(const Call& c, const RowLookup& p, const i32* rows, i64 n, float* out) {
  if (p.weight_storage < 0) return nullptr;
  const float* table = c.storages[p.weight_storage];
  const i64 kind = kind_of(c, p.weight_storage);
  for (i64 i = 0; i < n; i++) {
    out[i] = 0.f;
    if (rows[i] < 0) continue;
    if (kind == FP32) out[i] = table[rows[i]];
    else decode_row(kind, stored_row(c, p.weight_storage, rows[i]), 1, out + i, step_of(c, p.weight_storage));
  }
  return out;
}

// Slices of elements: they wrap around at the table's end, and each element may have a sign.
static void gather_slices(const Call& c, const RowLookup& p, i64 join, const i64* ids, const i32* rows, const float* factor,
                        i64 n, float* out, i64 stride) {
  const float* table = c.storages[p.storage] + p.base;
  const i64 ahead = 16;
  for (i64 i = 0; i < n; i++) {
    float* __restrict o = out + i * stride;
    if (i + ahead < n && rows[i + ahead] >= 0) {
      const float* later = table + rows[i + ahead] - p.base;
      prefetch(later, 4 * p.num_rows);
      prefetch(later + std::min(p.num_rows, p.rows - rows[i + ahead] + p.base) - 1, 1);  // slices begin anywhere in a line
    }
    if (rows[i] < 0) {
      for (i64 k = 0; k < p.num_rows; k++) join_into(o[k], p.product, join);
      continue;
    }
    const i64 first = rows[i] - p.base, straight = std::min(p.num_rows, p.rows - first);
    if (!factor && !p.has_sign && straight == p.num_rows) {
      if (join == STORE) {
        blocks<0>(p.num_rows, [&](auto lanes, i64 k) { lanes.store(o + k, lanes.load(table + first + k)); });
        continue;
      }
      for (i64 k = 0; k < p.num_rows; k++) join_into(o[k], table[first + k], join);
      continue;
    }
    const float f = factor ? factor[i] : 1.f;
    for (i64 k = 0; k < p.num_rows; k++) {
      float v = table[k < straight ? first + k : first + k - p.rows] * f;
      if (p.has_sign) v *= sign_of(ids[i], step_salt(p.sign, k));
      join_into(o[k], v, join);
    }
  }
}

// Reads the features of a thread's chunks; lookups are grouped once, then used for every chunk.
class Reader {
 public:
  explicit Reader(const Call& c) : c_(c) {}

  // Adds the vectors of a feature, written from `column` of an output on.
  void vectors(const Feature& f, const Chunk& at, i64 output, i64 column) {
    const RowLookup* all = c_.row_lookups + f.first;
    bool fits = true;
    for (i64 j = 0; j < f.row_lookups; j++) {
      fits &= fits_slots(all[j]) || (fits_slices(all[j]) && (j + 1 == f.row_lookups || all[j + 1].join == STORE));
      fits &= all[j].join == STORE || (j && all[j].column == all[j - 1].column && kind_of(c_, all[j].storage) == kind_of(c_, all[j - 1].storage) && step_of(c_, all[j].storage) == step_of(c_, all[j - 1].storage));
    }
    for (i64 j = 0, count; fits && j < f.row_lookups; j += count) {
      for (count = 1; j + count < f.row_lookups && all[j + count].join != STORE;) count++;
      fits &= count <= 64;
      add_item(f, at, j, count, output, column + all[j].column, true);
    }
    if (!fits || f.padding || f.optional) odd_.push_back({&f, at, output, column, !fits, false});
  }

  // Adds the unchanged rows of a feature to be saved for backward: if rows are multiplied by something, gradients need
  // their values, and by then the tables may have been updated.
  void rows(const Feature& f, const Chunk& at, i64 output, i64 column) {
    bool fits = true;
    for (i64 j = 0; j < f.row_lookups; j++) {
      const RowLookup& p = c_.row_lookups[f.first + j];
      if (p.num_rows == 1) add_item(f, at, j, 1, output, column + p.kept, false);
      fits &= p.num_rows == 1 && p.weight_storage < 0;
    }
    if (!fits) odd_.push_back({&f, at, output, column, false, true});
  }

  // Whether the ids of a call that has one per sample are the rows of their features' tables, in one group: their
  // addresses are found from the ids in one pass.
  bool by_ids() {
    if (c_.offsets || c_.ids_are_32 || c_.feature_stride != 1 || groups_.size() != 1 || !odd_.empty()) return false;
    Group& g = groups_[0];
    if (g.count != 1 || g.factor || g.slices || i64(g.slots.size()) != c_.feature_count) return false;
    limits_.resize(c_.feature_count);
    for (i64 k = 0; k < c_.feature_count; k++) {
      const Feature& f = c_.features[k];
      const RowLookup& p = c_.row_lookups[f.first];
      if (f.ids != k || f.optional || f.limit < 0 || p.rows_of.kind != IDENTITY) return false;
      limits_[k] = u64(std::min(f.limit, p.rows));
    }
    for (i64 k = 0; k < c_.feature_count; k++) g.slots[k].table += c_.row_lookups[c_.features[k].first].base * g.slots[k].bytes;
    return true;
  }

  // As `read`, of samples [from, from + n), `by_ids`; false where an id is out of range.
  bool read_by_ids(const Matrix* outputs, i64 from, i64 n) {
    const Group& g = groups_[0];
    const bool good = found_.set_by_ids(g, limits_, static_cast<const i64*>(c_.ids) + from * c_.sample_stride, c_.sample_stride, n);
    choose_reader(g)(g, found_, n, outputs[g.output]);
    return good;
  }

  bool empty() const { return groups_.empty() && odd_.empty(); }

  // Writes sample b of the chunks to row b of outputs[output].
  void read(const Matrix* outputs, i64 n) {
    for (const Factored& k : factored_) {
      const RowLookup& p = c_.row_lookups[k.feature->first + k.row_lookup];
      float weights[CHUNK];
      factors(p, k.at.ids, weights_of(c_, p, k.at.rows_of(k.row_lookup) + k.at.size, n, weights), n, k.out);
    }
    for (const Group& g : groups_) {
      found_.set(g, n);
      choose_reader(g)(g, found_, n, outputs[g.output]);
    }
    for (const Odd& k : odd_) {
      float* out = outputs[k.output].data + k.column;
      const i64 stride = outputs[k.output].stride;
      if (k.rows) keep(k, n, out, stride);
      else finish(k, n, out, stride);
    }
  }

 private:
  struct Factored {
    const Feature* feature;
    i64 row_lookup;
    Chunk at;
    float* out;
  };
  // Work on a feature that no group covers; `whole`: no group has read any of it.
  struct Odd {
    const Feature* feature;
    Chunk at;
    i64 output, column;
    bool whole, rows;
  };

  bool fits_slots(const RowLookup& p) const {
    if (p.num_rows != 1) return false;
    if (kind_of(c_, p.storage) == FP32) return p.span == p.width || p.width == 1;
    return p.span == p.width;
  }

  bool fits_slices(const RowLookup& p) const {
    const bool bare = !has_factor(p) && !p.has_sign && p.join == STORE;
    return p.num_rows > 1 && bare && p.width == 1 && p.span == p.num_rows && p.span <= p.rows && kind_of(c_, p.storage) == FP32;
  }

  // Adds row lookups [j, j + count) of a feature, combined; or, not `joined`, the unchanged row of one.
  void add_item(const Feature& f, const Chunk& at, i64 j, i64 count, i64 output, i64 column, bool joined) {
    const RowLookup* all = c_.row_lookups + f.first + j;
    const i64 width = joined ? all->span : all->width, join = count > 1 ? all[1].join : i64(STORE);
    Group group{output, width, kind_of(c_, all->storage), join, count, false, all->num_rows > 1, 0, float(all->product), step_of(c_, all->storage), {}, {}};
    for (i64 k = 0; joined && k < count; k++) {
      group.factor |= has_factor(all[k]);
      group.repeated |= u64(all[k].num_rows == 1 && all[k].span != all[k].width) << k;
    }
    if (group.repeated && join == STORE) group.join = ADD;  // with a single slot, ADD stores
    auto found = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.fits(group); });
    if (found == groups_.end()) {
      group.slots.reserve(c_.row_lookup_count);
      group.columns.reserve(c_.feature_count);
      found = groups_.insert(found, std::move(group));
    }
    for (i64 k = 0; k < count; k++) {
      const RowLookup& p = all[k];
      float* factor = nullptr;
      if (found->factor) {
        memory_.emplace_back(new float[at.size]);
        factor = memory_.back().get();
        factored_.push_back({&f, j + k, at, factor});
      }
      Slot& slot = found->slots.emplace_back();
      slot.table = reinterpret_cast<const char*>(c_.storages[p.storage]);
      slot.bytes = row_bytes(c_, p.storage);
      slot.rows = at.rows_of(j + k);
      slot.factor = factor;
      slot.base = p.base, slot.end = p.base + p.rows;
    }
    found->columns.push_back(column);
  }

  // Combines the values of a row lookup for n ids into `out`.
  void read_row_lookup(const RowLookup& p, const Chunk& at, i64 j, i64 n, float* out, i64 stride) const {
    float memory[CHUNK], weights[CHUNK];
    const float* factor = has_factor(p) ? memory : nullptr;
    if (factor) factors(p, at.ids, weights_of(c_, p, at.rows_of(j) + at.size, n, weights), n, memory);
    if (p.num_rows > 1 && kind_of(c_, p.storage) == FP32) gather_slices(c_, p, p.join, at.ids, at.rows_of(j), factor, n, out, stride);
    else gather_decoded(c_, p, p.join, at.ids, at.rows_of(j), factor, n, out, stride);
  }

  void finish(const Odd& k, i64 n, float* out, i64 stride) const {
    const Feature& f = *k.feature;
    for (i64 j = 0; k.whole && j < f.row_lookups; j++) {
      const RowLookup& p = c_.row_lookups[f.first + j];
      read_row_lookup(p, k.at, j, n, out + p.column, stride);
    }
    for (i64 i = 0; f.padding && i < n; i++)
      std::memset(out + i * stride + f.width - f.padding, 0, f.padding * sizeof(float));
    for (i64 i = 0; f.optional && i < n; i++)
      if (k.at.none[i]) std::memset(out + i * stride, 0, f.width * sizeof(float));
  }

  // Saves slices without signs or factors, and learned scalars.
  void keep(const Odd& k, i64 n, float* out, i64 stride) const {
    for (i64 j = 0; j < k.feature->row_lookups; j++) {
      RowLookup p = c_.row_lookups[k.feature->first + j];
      p.has_sign = 0;
      if (p.num_rows > 1 && kind_of(c_, p.storage) != FP32) gather_decoded(c_, p, STORE, k.at.ids, k.at.rows_of(j), nullptr, n, out + p.kept, stride);
      else if (p.num_rows > 1) gather_slices(c_, p, STORE, k.at.ids, k.at.rows_of(j), nullptr, n, out + p.kept, stride);
      float weights[CHUNK];
      if (weights_of(c_, p, k.at.rows_of(j) + k.at.size, n, weights))
        for (i64 i = 0; i < n; i++) out[i * stride + p.kept + p.num_rows * p.width] = weights[i];
    }
  }

  const Call& c_;
  std::vector<Group> groups_;
  std::vector<Factored> factored_;
  std::vector<Odd> odd_;
  std::vector<std::unique_ptr<float[]>> memory_;
  Found found_;
  std::vector<u64> limits_;
};

// Saved values per feature: those of its i-th id are at data + i * stride + the row lookup's `kept`.
static std::vector<Matrix> kept_of(const Call& c) {
  std::vector<Matrix> found(c.feature_count, c.kept);
  float* next = c.kept.data;
  for (i64 f = 0; c.offsets && next && f < c.feature_count; f++) {
    const Feature& feature = c.features[f];
    i64 width = 0;
    for (i64 j = 0; !feature.plain && j < feature.row_lookups; j++) {
      const RowLookup& p = c.row_lookups[feature.first + j];
      width += p.num_rows * p.width + (p.weight_storage >= 0);
    }
    found[f] = {next - (feature.plain ? 0 : c.row_lookups[feature.first].kept), width};
    next += width * count_ids(c, feature);
  }
  return found;
}

#include "bags.inl"

// Looks up samples [from, to); false if an id or row is out of range.
static bool look_up(const Call& c, i64 from, i64 to) {
  if (c.offsets) return look_up_bags(c, from, to);
  const Workspace work(c, to - from);
  Reader vectors(c), rows(c);
  for (i64 k = 0; k < c.feature_count; k++) {
    const Feature& f = c.features[k];
    const Chunk chunk = work.chunk(c.features, k);
    vectors.vectors(f, chunk, f.output, f.column);
    if (c.kept.data && !f.plain) rows.rows(f, chunk, 0, 0);
  }
  std::vector<Matrix> outputs(c.outputs, c.outputs + c.output_count);
  const bool by_ids = rows.empty() && vectors.by_ids();
  bool good = true;
  for (i64 at = from; at < to; at += work.size()) {
    const i64 n = std::min(work.size(), to - at);
    prefetch_ids(c, at + n, std::min(to, at + n + work.size()));
    for (i64 o = 0; o < c.output_count; o++) outputs[o].data = c.outputs[o].data + at * c.outputs[o].stride;
    if (by_ids) {
      good &= vectors.read_by_ids(outputs.data(), at, n);
      if (c.mask && good) good = mask(*c.mask, at, at + n);
      continue;
    }
    // Two loops: vector loads of ids stall if scalar stores wrote them just before (store forwarding fails).
    for (i64 k = 0; k < c.feature_count; k++) take_ids(c, c.features[k], at, n, work.chunk(c.features, k));
    for (i64 k = 0; k < c.feature_count; k++) good &= find_rows(c, c.features[k], n, work.chunk(c.features, k));
    vectors.read(outputs.data(), n);
    if (c.mask && good) good = mask(*c.mask, at, at + n);
    Matrix kept = c.kept;
    if (kept.data) kept.data += at * kept.stride;
    rows.read(&kept, n);
  }
  return good;
}
