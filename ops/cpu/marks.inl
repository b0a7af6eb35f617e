// What the gradient of each lookup is for: the step of its row, or a sum, where other lookups read the row too. Part of
// kernels.inl.

// Of a lookup that shares its row with others: whether it is the first or the last of these.
constexpr i32 FIRST = 1, LAST = 2;

// In place of the row, of which `place` is the sum's: a row is not negative, and -1 is none.
static inline i32 mark_of(i64 place, i32 kind) { return i32(-2 - (place * 4 + kind)); }

// A table whose lookups are marked.
struct Marked {
  const TableReads* reads;
  i32* row_of;                   // [places] row of each sum
  i64 places;
  float* sums;                   // [places, width]
  std::vector<i64> ends;         // last place of each part of a table that several threads share, then its last row
};

// Whether an array over all rows of a table is worth it.
static bool has_few_rows(const TableReads& t) { return t.rows <= 4 * t.lookups(); }

// Marks the lookups of a table of few rows by counting.
static void mark_by_count(const TableReads& t, Marked& to, std::vector<i32>& left, std::vector<i32>& place_of) {
  left.assign(t.rows, 0);
  place_of.resize(t.rows);
  t.walk(0, 1, [&](i64 s, i64 b) {
    const i32 row = t.sources[s].of[b];
    if (row >= 0) left[row - t.base]++;
  });
  i32 places = 0;
  t.walk(0, 1, [&](i64 s, i64 b) {
    i32& row = t.sources[s].of[b];
    if (row < 0) return;
    const i64 at = row - t.base;
    // From the first of several lookups on, the number left is negative.
    if (left[at] == 1) return;
    if (left[at] > 1) {
      to.row_of[places] = row;
      left[at] = 1 - left[at];
      row = mark_of(place_of[at] = places++, FIRST);
      return;
    }
    left[at]++;
    row = mark_of(place_of[at], left[at] ? 0 : LAST);
  });
  to.places = places;
}

// Number of rows of sorted entries [from, to) that several lookups read.
static i64 count_shared(const u64* entries, i64 from, i64 to) {
  i64 count = 0;
  bool before = false;
  for (i64 i = from; i + 1 < to; i++) {
    const bool next = same_row(entries[i], entries[i + 1]);
    count += next & !before;
    before = next;
  }
  return count;
}

// Marks the lookups of sorted entries [from, to), whose sums begin at `place`. Without branches: the end of a row's
// entries is hard to predict. It may write one more row_of than there are sums. Returns the place behind them.
static i64 mark_sorted(const TableReads& t, const u64* entries, i64 from, i64 to, i64 place, i32* row_of_place) {
  bool before = false;
  for (i64 i = from; i < to; i++) {
    const bool next = i + 1 < to && same_row(entries[i], entries[i + 1]), first = next & !before;
    const i32 row = i32(row_of(entries[i]));
    row_of_place[place] = row;
    place += first;
    const i32 mark = mark_of(place - 1, (first ? FIRST : 0) | (next ? 0 : LAST));
    t.row(entries[i] & ((u64(1) << PLACE_BITS) - 1)) = (next | before) ? mark : row;
    before = next;
  }
  return place;
}

// Where part p of `parts` parts of sorted entries begins; no row is in two.
static i64 start_of_part(const u64* entries, i64 count, i64 p, i64 parts) {
  i64 at = count * p / parts;
  while (at && at < count && same_row(entries[at], entries[at - 1])) at++;
  return at;
}

// Marks the lookups of a table that `threads` threads share, each of them a part of its rows.
static void mark_in_parts(const TableReads& t, Marked& to, u64* from, u64* buffer, i64 threads) {
  i64 count = 0;
  const u64* entries = sorted_entries(t, from, buffer, threads, count);
  std::vector<i64> places(threads + 1, 0);
  to.ends.assign(2 * threads, 0);
  auto start = [&](i64 p) { return start_of_part(entries, count, p, threads); };
  parallel(threads, [&](i64 thread, i64 team) {
    for (i64 p = thread; p < threads; p += team) {
      const i64 end = start(p + 1);
      places[p + 1] = count_shared(entries, start(p), end) + 1;
      to.ends[2 * p + 1] = end ? row_of(entries[end - 1]) : -1;
    }
  });
  for (i64 p = 0; p < threads; p++) to.ends[2 * p] = places[p + 1] += places[p];
  to.places = places[threads];
  parallel(threads, [&](i64 thread, i64 team) {
    for (i64 p = thread; p < threads; p += team) mark_sorted(t, entries, start(p), start(p + 1), places[p], to.row_of);
  });
}
