// Products of the slices of tensor trains, and their gradients. Part of kernels.inl.
//
// Slices of an id stand one after the other: that of core k is [rank[k], width[k], rank[k + 1]]. The product so far is
// a matrix [left, rank]; times the next slice, as [rank, width * next rank], it is that of the next core, row by row.

// out[R, columns] = a[R, inner] * b[inner, columns], of which each part that is read serves R rows.
template <int R>
static inline void multiply_rows(const float* a, const float* b, float* out, i64 inner, i64 columns) {
  blocks<0>(columns, [&](auto lanes, i64 k) {
    typedef decltype(lanes) L;
    typename L::V sums[R];
    for (int i = 0; i < R; i++) sums[i] = L::all(0.f);
    for (i64 p = 0; p < inner; p++) {
      const auto part = L::load(b + p * columns + k);
      for (int i = 0; i < R; i++) sums[i] += L::all(a[i * inner + p]) * part;
    }
    for (int i = 0; i < R; i++) L::store(out + i * columns + k, sums[i]);
  });
}

// out[rows, columns] = a[rows, inner] * b[inner, columns]
static inline void multiply(const float* a, const float* b, float* out, i64 rows, i64 inner, i64 columns) {
  i64 i = 0;
  for (; i + 4 <= rows; i += 4) multiply_rows<4>(a + i * inner, b, out + i * columns, inner, columns);
  for (; i + 2 <= rows; i += 2) multiply_rows<2>(a + i * inner, b, out + i * columns, inner, columns);
  for (; i < rows; i++) multiply_rows<1>(a + i * inner, b, out + i * columns, inner, columns);
}

// to[columns, rows] = from[rows, columns]^T, by tiles of 4 times 4, which stay in registers.
static inline void transpose(const float* from, float* to, i64 rows, i64 columns) {
  typedef Lanes<4> L;
  const i64 even_rows = rows / 4 * 4, even_columns = columns / 4 * 4;
  for (i64 k = 0; k < even_columns; k += 4)
    for (i64 p = 0; p < even_rows; p += 4) {
      const float* tile = from + p * columns + k;
      const L::V a = L::load(tile), b = L::load(tile + columns), c = L::load(tile + 2 * columns), d = L::load(tile + 3 * columns);
      for (int j = 0; j < 4; j++) L::store(to + (k + j) * rows + p, L::V{a[j], b[j], c[j], d[j]});
    }
  for (i64 p = 0; p < rows; p++)
    for (i64 k = p < even_rows ? even_columns : 0; k < columns; k++) to[k * rows + p] = from[p * columns + k];
}

// Products of ids [begin, end); with `gradient`, those of the slices from `gradient [n, width]` into `of_columns`.
static void train(const Train& t, i64 begin, i64 end) {
  i64 width = 1, columns = 0;
  i64 largest = 1, slice = 1, at[MOST_CORES], left[MOST_CORES];
  for (i64 k = 0; k < t.cores; k++) {
    at[k] = columns, left[k] = width;
    columns += t.ranks[k] * t.widths[k] * t.ranks[k + 1];
    slice = std::max(slice, columns - at[k]);
    width *= t.widths[k];
    largest = std::max(largest, width * t.ranks[k + 1]);
  }
  // The products of the first cores, the last of which is the output; gradients of two of them; one of all these transposed.
  std::vector<float> memory(largest * (t.cores + 2) + std::max(slice, largest));
  float* turned = memory.data() + largest * (t.cores + 2);
  for (i64 i = begin; i < end; i++) {
    const float* slices = t.columns + i * columns;
    const float* so_far[MOST_CORES];
    so_far[0] = slices;
    const i64 last = t.cores - 1;
    for (i64 k = 1; k < (t.gradient ? last : t.cores); k++) {
      float* to = k == last ? t.out + i * width : memory.data() + k * largest;
      multiply(so_far[k - 1], slices + at[k], to, left[k], t.ranks[k], t.widths[k] * t.ranks[k + 1]);
      so_far[k] = to;
    }
    if (!t.gradient) continue;
    const float* g = t.gradient + i * width;
    float* of = t.of_columns + i * columns;
    for (i64 k = last; k > 0; k--) {
      float* of_left = k == 1 ? of : memory.data() + (t.cores + (k & 1)) * largest;
      const i64 wide = t.widths[k] * t.ranks[k + 1];
      transpose(so_far[k - 1], turned, left[k], t.ranks[k]);
      multiply(turned, g, of + at[k], t.ranks[k], left[k], wide);
      transpose(slices + at[k], turned, t.ranks[k], wide);
      multiply(g, turned, of_left, left[k], wide, t.ranks[k]);
      g = of_left;
    }
  }
}
