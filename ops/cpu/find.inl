// Reads the ids of a batch in chunks and transforms them to rows. Part of kernels.inl.

// Always inlined: GCC takes functions that only prefetch for ones that do nothing. LEVEL: 3 of all caches, 2 of the L2
// cache and those behind it, where more lines may be on their way at a time.
template <int LEVEL = 3>
static inline __attribute__((always_inline)) void prefetch(const void* address, i64 bytes) {
#if defined(__GNUC__)
  for (i64 at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(address) + at, 0, LEVEL);
#endif
}

// A chunk of one feature's ids and their rows: per row lookup, `rows` holds `size` rows of its table, then `size` rows
// of its weights.
struct Chunk {
  i64 size;
  i64* ids;
  unsigned char* none;
  i32* rows;

  const i32* rows_of(i64 row_lookup) const { return rows + 2 * size * row_lookup; }
};

// Memory of one thread for a chunk of every feature; with bags, for one feature at a time.
class Workspace {
 public:
  Workspace(const Call& c, i64 samples) : features_(c.offsets ? 1 : c.feature_count), row_lookups_(c.row_lookup_count) {
    // The more features, the shorter the chunks: their rows have to stay in the L1 or L2 cache until they are read.
    size_ = std::max<i64>(8, std::min<i64>(CHUNK, 6400 / std::max<i64>(1, c.row_lookup_count) / 8 * 8));
    size_ = c.offsets ? BAG_CHUNK : std::min(size_, std::max<i64>(8, samples));
    const i64 ids = features_ * size_, rows = 2 * row_lookups_ * size_;
    memory_.reset(new char[ids * 9 + rows * 4 + 8]);
    ids_ = reinterpret_cast<i64*>(memory_.get());
    rows_ = reinterpret_cast<i32*>(ids_ + ids);
    none_ = reinterpret_cast<unsigned char*>(rows_ + rows);
  }

  i64 size() const { return size_; }

  Chunk chunk(const Feature* all, i64 feature) const {
    const i64 at = (features_ == 1 ? 0 : feature) * size_;
    return {size_, ids_ + at, none_ + at, rows_ + 2 * size_ * all[feature].first};
  }

 private:
  i64 features_, row_lookups_, size_;
  std::unique_ptr<char[]> memory_;
  i64* ids_;
  i32* rows_;
  unsigned char* none_;
};

// Position of a sample's first id of a feature.
static inline i64 first_id(const Call& c, const Feature& f, i64 sample) {
  return c.offsets ? c.offsets[f.ids * c.batch + sample] : sample;
}

// Number of ids of a feature.
static inline i64 count_ids(const Call& c, const Feature& f) { return first_id(c, f, c.batch) - first_id(c, f, 0); }

// Copies ids [first, first + n) of a feature into the chunk, as 64-bit integers.
static void take_ids(const Call& c, const Feature& f, i64 first, i64 n, const Chunk& at) {
  const i64 step = c.offsets ? 1 : c.sample_stride, from = first * step + (c.offsets ? 0 : f.ids * c.feature_stride);
  if (c.ids_are_32)
    for (i64 i = 0; i < n; i++) at.ids[i] = static_cast<const i32*>(c.ids)[from + i * step];
  else
    for (i64 i = 0; i < n; i++) at.ids[i] = static_cast<const i64*>(c.ids)[from + i * step];
}

// Rows of n ids for all row lookups of their feature; false if an id is out of range.
static bool find_rows(const Call& c, const Feature& f, i64 n, const Chunk& at) {
  i64 wrong = 0;
  if (f.limit >= 0)
    for (i64 i = 0; i < n; i++) wrong |= u64(at.ids[i]) >= u64(f.limit);
  const unsigned char* none = f.optional ? at.none : nullptr;
  if (f.optional)
    for (i64 i = 0; i < n; i++) at.none[i] = at.ids[i] == -1;
  for (i64 j = 0; j < f.row_lookups; j++) {
    const RowLookup& p = c.row_lookups[f.first + j];
    i32* rows = at.rows + 2 * at.size * j;
    wrong |= !storage_rows(p.rows_of, c.index, p.base, p.rows, at.ids, n, none, rows);
    if (p.weight_storage >= 0)
      wrong |= !storage_rows(p.weight_of, c.index, p.weight_base, p.weight_rows, at.ids, n, none, rows + at.size);
  }
  return !wrong;
}

// take_ids, then find_rows.
static bool find(const Call& c, const Feature& f, i64 first, i64 n, const Chunk& at) {
  take_ids(c, f, first, n, at);
  return find_rows(c, f, n, at);
}

// Features read ids with a stride that hardware prefetchers do not detect.
static inline __attribute__((always_inline)) void prefetch_ids(const Call& c, i64 from, i64 to) {
  const i64 size = c.ids_are_32 ? 4 : 8;
  if (c.feature_stride != 1) return;
  for (i64 i = from; i < to; i++)
    prefetch(static_cast<const char*>(c.ids) + i * c.sample_stride * size, c.feature_count * size);
}

static inline i64 kind_of(const Call& c, i64 storage) { return c.storage_kinds ? c.storage_kinds[storage] : i64(FP32); }

static inline float step_of(const Call& c, i64 storage) { return c.storage_steps ? float(c.storage_steps[storage]) : 0.f; }

static inline i64 row_bytes(const Call& c, i64 storage) {
  return c.storage_bytes ? c.storage_bytes[storage] : i64(4 * c.storage_widths[storage]);
}
