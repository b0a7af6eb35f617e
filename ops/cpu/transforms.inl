// Transforms of ids to rows, vectorised over a chunk of ids. Part of kernels.inl.

// floor(x / d) for d > 0. Multiplying by 1 / d is off by at most one while the quotient is below 2^50.
static void quotients(const i64* x, i64 n, i64 d, i64* out) {
  i64 all = 0, most = 0;
  for (i64 i = 0; i < n; i++) all |= x[i], most = x[i] > most ? x[i] : most;
  if (all >= 0 && most / d < (i64(1) << 50)) {
    const double inverse = 1.0 / double(d);
    for (i64 i = 0; i < n; i++) {
      i64 q = i64(double(x[i]) * inverse), rest = i64(u64(x[i]) - u64(q) * u64(d));
      out[i] = q + (rest >= d) - (rest < 0);
    }
    return;
  }
  for (i64 i = 0; i < n; i++) {
    i64 q = x[i] / d;
    out[i] = q - (q * d > x[i]);
  }
}

static void remainders(const i64* x, i64 n, i64 d, i64* out) {
  i64 q[CHUNK];
  quotients(x, n, d, q);
  for (i64 i = 0; i < n; i++) out[i] = i64(u64(x[i]) - u64(q[i]) * u64(d));
}

static inline u64 splitmix(u64 z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// (bits * size) >> 64 for size < 2^31, in 64-bit products that vectorise.
static inline i64 reduce_range(u64 bits, u64 size) {
  return i64(((bits >> 32) * size + (((bits & 0xFFFFFFFFull) * size) >> 32)) >> 32);
}

static void digits(const Transform& t, const i64* x, i64 n, i64* rows) {
  i64 moved[CHUNK];
  if (t.affine) {
    for (i64 i = 0; i < n; i++) moved[i] = i64(u64(x[i]) * u64(t.a) + u64(t.b));
    remainders(moved, n, t.p, moved);
    x = moved;
  }
  if (t.div != 1) {
    quotients(x, n, t.div, rows);
    x = rows;
  }
  if (t.mod) remainders(x, n, t.mod, rows);
  else if (x != rows) std::memcpy(rows, x, n * sizeof(i64));
}

static void hashes(const Transform& t, const i64* x, i64 n, i64* rows) {
  const u64 salt = t.salt, size = t.size;
  const i64 stride = t.stride, offset = t.offset, frequent = t.num_frequent, own = t.absent ? 0 : -1;
  for (i64 i = 0; i < n; i++) rows[i] = reduce_range(splitmix(u64(x[i]) ^ salt), size) * stride + offset;
  if (frequent)
    for (i64 i = 0; i < n; i++)
      if (u64(x[i]) < u64(frequent)) rows[i] = own ? x[i] : -1;
}

static inline u64 fmix(u64 h) {
  h = (h ^ (h >> 33)) * 0xFF51AFD7ED558CCDull;
  h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53ull;
  return h ^ (h >> 33);
}

static void murmur(const Transform& t, const i64* x, i64 n, i64* rows) {
  i64 words[CHUNK];
  for (i64 i = 0; i < n; i++) {
    u64 k = u64(x[i]) * 0x87C37B91114253D5ull;
    k = ((k << 31) | (k >> 33)) * 0x4CF5AD432745937Full;
    u64 h2 = u64(t.salt) ^ 8, h1 = (k ^ u64(t.salt) ^ 8) + h2;
    h2 += h1;
    h1 = fmix(h1), h2 = fmix(h2);
    h1 += h2, h2 += h1;
    u64 half = t.word < 2 ? h1 : h2;
    words[i] = i64(t.word & 1 ? half >> 32 : half & 0xFFFFFFFFull);
  }
  remainders(words, n, t.size, rows);
}

static inline i64 bits_set(u64 x) {
#if defined(__GNUC__)
  return __builtin_popcountll(x);
#else
  i64 n = 0;
  for (; x; x &= x - 1) n++;
  return n;
#endif
}

// The i-th array of a transform's index, from the offset at which this index begins in it.
template <class T>
static const T* index_array(const Transform& t, const void* const* index, i64 i) {
  return static_cast<const T*>(index[t.array + i]) + t.at;
}

static void set_ranks(const Transform& t, const void* const* index, const i64* x, i64 n, i64* rows) {
  if (t.kind == RANGE) {
    for (i64 i = 0; i < n; i++) {
      u64 place = u64(x[i]) - u64(t.start);
      rows[i] = place < u64(t.count) ? i64(place) : -1;
    }
  } else if (t.kind == BITMAP) {
    const i64* words = index_array<i64>(t, index, 0);
    const i32* ranks = index_array<i32>(t, index, 1);
    for (i64 i = 0; i < n; i++) {
      rows[i] = -1;
      if (u64(x[i]) >= u64(t.size)) continue;
      i64 at = x[i] >> 6, bit = x[i] & 63;
      u64 word = u64(words[at]);
      if (word >> bit & 1) rows[i] = ranks[at] + bits_set(word & ((u64(1) << bit) - 1));
    }
  } else {
    const i32* first = index_array<i32>(t, index, 0);
    for (i64 i = 0; i < n; i++) {
      i64 low = 0, high = t.count;  // the first id of the set >= x
      while (low < high) {
        i64 middle = (low + high) / 2;
        if (first[middle] < x[i]) low = middle + 1;
        else high = middle;
      }
      rows[i] = low < t.count && first[low] == x[i] ? low : -1;
    }
  }
  if (t.rest)
    for (i64 i = 0; i < n; i++)
      if (rows[i] < 0) rows[i] = t.count + reduce_range(splitmix(u64(x[i]) ^ u64(t.salt)), u64(t.rest));
}

// Numbers of `bits` bits in 32-bit words, lowest bits first; a word follows the last.
static void codes(const Transform& t, const void* const* index, const i64* x, i64 n, i64* rows) {
  const u32* words = index_array<u32>(t, index, 0);
  const u64 mask = (u64(1) << t.bits) - 1;
  for (i64 i = 0; i < n; i++) {
    rows[i] = -1;
    if (u64(x[i]) >= u64(t.size)) continue;
    const i64 bit = (x[i] * t.stride + t.offset) * t.bits;
    const u64 both = u64(words[bit >> 5]) | u64(words[(bit >> 5) + 1]) << 32;
    rows[i] = i64(both >> (bit & 31) & mask);
  }
}

static void map_ids(const Transform& t, const void* const* index, const i64* x, i64 n, i64* rows) {
  switch (t.kind) {
    case DIGIT: return digits(t, x, n, rows);
    case HASH: return hashes(t, x, n, rows);
    case MURMUR: return murmur(t, x, n, rows);
    case IDENTITY: return void(std::memcpy(rows, x, n * sizeof(i64)));
    case CODES: return codes(t, index, x, n, rows);
    default: return set_ranks(t, index, x, n, rows);
  }
}

// Rows of a storage. A row outside its table (damaged arrays, an unchecked id) becomes -1 and is never read.
static bool storage_rows(const Transform& t, const void* const* index, i64 base, i64 table_rows, const i64* x, i64 n,
                         const unsigned char* none, i32* out) {
  i64 rows[CHUNK];
  map_ids(t, index, x, n, rows);
  i64 wrong = 0;
  for (i64 i = 0; i < n; i++) {
    bool inside = u64(rows[i]) < u64(table_rows);
    wrong |= !inside & (rows[i] != -1);
    out[i] = inside ? i32(base + rows[i]) : -1;
  }
  if (none)
    for (i64 i = 0; i < n; i++)
      if (none[i]) out[i] = -1;
  return !wrong;
}
