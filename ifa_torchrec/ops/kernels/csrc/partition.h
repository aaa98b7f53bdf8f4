// How rows are divided: into partitions, which threads pick up; into tiles, which stay in cache; and into
// segments of a tile, each of one request.
#pragma once

constexpr int TILE = 64;             // rows
constexpr int MAX_PARTITIONS = 128;  // fixed, so that results do not depend on the number of threads

// The request that the row belongs to: the last non-empty one that begins at or before it.
static int64_t request_of(const int64_t* offsets, int64_t B, int64_t row) {
  int64_t low = 0, high = B;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (offsets[middle] <= row ? low : high) = middle;
  }
  return low;
}

// The rows of one partition that are processed at a time.
struct Tile {
  int partition;
  int64_t row, rows;
};

// The rows of a tile that belong to one request; whether they are the request's first in the partition,
// and its last.
struct Segment {
  int64_t request, from, count;  // from: index within the tile
  bool starts, ends;
};

struct Rows {
  const int64_t* offsets;
  int64_t requests, count;
  int partitions;

  Rows(const int64_t* offsets, int64_t B, int64_t min_rows)
      : offsets(offsets), requests(B), count(offsets[B]) {
    partitions = int(max(1, min(MAX_PARTITIONS, count / min_rows)));
  }

  int64_t first(int partition) const { return count * partition / partitions; }

  // To be called by each thread of a parallel region. For each tile it calls before(tile),
  // of_segment(tile, segment) for each of its segments, and after(tile).
  template <class Before, class OfSegment, class After>
  void each_tile(Before before, OfSegment of_segment, After after) const {
#pragma omp for schedule(dynamic, 1)
    for (int partition = 0; partition < partitions; ++partition) {
      const int64_t begin = first(partition), end = first(partition + 1);
      if (begin == end) continue;
      int64_t b = request_of(offsets, requests, begin);
      bool starts = true;
      for (int64_t row = begin; row < end; row += TILE) {
        const Tile tile{partition, row, min(TILE, end - row)};
        before(tile);
        for (int64_t from = row; from < row + tile.rows;) {
          while (offsets[b + 1] <= from) ++b;
          const int64_t to = min(offsets[b + 1], row + tile.rows);
          const bool whole = to == offsets[b + 1];
          of_segment(tile, Segment{b, from - row, to - from, starts, whole || to == end});
          starts = whole;
          from = to;
        }
        after(tile);
      }
    }
  }
};

// Sums the partitions' rows into states [B, state_size] and sums [B, sum_size].
//
// A partition's sum for a request that began in an earlier partition is kept aside and added at the end,
// partition by partition: the order, and so the result, is the same for any number of threads.
class StateSums {
 public:
  StateSums(const Rows& rows, float* state, int64_t state_size, float* sum, int64_t sum_size)
      : rows_(rows), state_(state), sum_(sum), state_size_(state_size), sum_size_(sum_size),
        partials_(rows.partitions * (state_size + sum_size)) {
    for (int i = 0; i < rows.partitions; ++i) request_[i] = -1;
  }

  // Where a partition writes a request's state and sum.
  void place(int partition, int64_t request, float** state, float** sum) {
    *state = state_ + request * state_size_;
    *sum = sum_ + request * sum_size_;
    if (rows_.offsets[request] >= rows_.first(partition)) return;
    request_[partition] = request;
    *state = partials_ + partition * (state_size_ + sum_size_);
    *sum = *state + state_size_;
  }

  // Zeroes the states of requests without rows. To be called by each thread of a parallel region.
  void clear_empty() const {
#pragma omp for
    for (int64_t b = 0; b < rows_.requests; ++b)
      if (rows_.offsets[b] == rows_.offsets[b + 1]) {
        memset(state_ + b * state_size_, 0, state_size_ * 4);
        memset(sum_ + b * sum_size_, 0, sum_size_ * 4);
      }
  }

  void add_partials() const {
    for (int i = 0; i < rows_.partitions; ++i) {
      if (request_[i] < 0) continue;
      const float* partial = partials_ + i * (state_size_ + sum_size_);
      add(state_ + request_[i] * state_size_, partial, state_size_);
      add(sum_ + request_[i] * sum_size_, partial + state_size_, sum_size_);
    }
  }

 private:
  const Rows& rows_;
  float *state_, *sum_;
  int64_t state_size_, sum_size_;
  Floats partials_;
  int64_t request_[MAX_PARTITIONS];  // the request whose partial sum each partition has; -1 for none
};

// The gradient of a weight [Q, Dp], padded, for each partition; and their sum in the caller's layout.
class WeightSums {
 public:
  WeightSums(const Shape& s, const Rows& rows)
      : s_(s), partitions_(rows.partitions), size_((int64_t(s.Q) * s.Dp + 15) / 16 * 16),
        partials_(size_ * rows.partitions) {
    partials_.clear();
  }

  float* of(int partition) const { return partials_ + size_ * partition; }

  void add_to(float* weight) const {
    memset(weight, 0, int64_t(s_.H) * s_.d * s_.D * 4);
    for (int partition = 0; partition < partitions_; ++partition)
      for (int h = 0; h < s_.H; ++h)
        for (int i = 0; i < s_.d; ++i)
          add(weight + (h * s_.d + i) * s_.D, of(partition) + (h * s_.dp + i) * s_.Dp, s_.D);
  }

 private:
  const Shape& s_;
  int partitions_;
  int64_t size_;
  Floats partials_;
};
