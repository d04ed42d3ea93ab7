// Neighbour tables of sparse convolution and the grouping of voxels into patches: everything that turns
// coordinates into indices. `status` is where bad input is reported: status[0] is the first row whose coordinates
// do not fit a key, status[1] the first row found to repeat another; both start at the number of rows.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "portable.h"
#include "sparse_keys.h"

namespace d23 {
namespace {

constexpr int64_t kGrain = 4096;

// The smallest row any thread reports; the result does not depend on which thread comes first.
class FirstRow {
 public:
  explicit FirstRow(int64_t none) : row_(none) {}
  void report(int64_t row) {
    int64_t current = row_.load(std::memory_order_relaxed);
    while (row < current && !row_.compare_exchange_weak(current, row, std::memory_order_relaxed)) {
    }
  }
  int64_t get() const { return row_.load(); }

 private:
  std::atomic<int64_t> row_;
};

void voxel_keys(const int32_t* coords, int64_t* keys, int64_t* status, int64_t count, int64_t patch, int64_t threads) {
  FirstRow outside(count);
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool fits = coord_fits(coords + 4 * i);
      if (!fits) outside.report(i);
      keys[i] = fits ? patch_key(coords + 4 * i, patch) : 0;
    }
  });
  status[0] = outside.get();
}

// Stable radix sort on 8-bit digits, least significant first, skipping digits that all keys share. Pieces and
// their order depend on the count alone, so the result is the same for any number of threads.
class RadixSort {
 public:
  RadixSort(int64_t* keys, int32_t* order, int64_t count, int64_t threads)
      : keys_(keys), order_(order), count_(count), threads_(threads) {
    piece_size_ = std::max<int64_t>(2 * kGrain, (count + 63) / 64);
    pieces_ = (count + piece_size_ - 1) / piece_size_;
  }

  void run() {
    std::iota(order_, order_ + count_, 0);
    if (std::is_sorted(keys_, keys_ + count_)) return;
    std::vector<int64_t> other_keys(count_);
    std::vector<int32_t> other_order(count_);
    int64_t* keys[2] = {keys_, other_keys.data()};
    int32_t* orders[2] = {order_, other_order.data()};
    const uint64_t varying = varying_bits();
    int source = 0;
    for (int shift = 0; shift < 64; shift += 8) {
      if ((varying >> shift & 255) == 0) continue;
      pass(keys[source], orders[source], keys[1 - source], orders[1 - source], shift);
      source = 1 - source;
    }
    if (source == 1) {
      std::memcpy(keys_, other_keys.data(), count_ * sizeof(int64_t));
      std::memcpy(order_, other_order.data(), count_ * sizeof(int32_t));
    }
  }

 private:
  uint64_t varying_bits() const {
    uint64_t bits = 0;
    for (int64_t i = 1; i < count_; ++i) bits |= static_cast<uint64_t>(keys_[i] ^ keys_[0]);
    return bits;
  }

  void pass(const int64_t* keys, const int32_t* order, int64_t* out_keys, int32_t* out_order, int shift) const {
    std::vector<std::array<int64_t, 256>> starts(pieces_);
    each_piece([&](int64_t piece, int64_t begin, int64_t end) {
      starts[piece].fill(0);
      for (int64_t i = begin; i < end; ++i) ++starts[piece][keys[i] >> shift & 255];
    });
    int64_t total = 0;
    for (int digit = 0; digit < 256; ++digit) {
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        const int64_t here = starts[piece][digit];
        starts[piece][digit] = total;
        total += here;
      }
    }
    each_piece([&](int64_t piece, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t to = starts[piece][keys[i] >> shift & 255]++;
        out_keys[to] = keys[i];
        out_order[to] = order[i];
      }
    });
  }

  template <class Body>
  void each_piece(const Body& body) const {
    parallel_for(pieces_, 1, threads_, [&](int64_t piece, int64_t) {
      body(piece, piece * piece_size_, std::min((piece + 1) * piece_size_, count_));
    });
  }

  int64_t* keys_;
  int32_t* order_;
  int64_t count_, threads_, piece_size_, pieces_;
};

// table[k, order[i]] = row of the voxel at keys[i] + offset k, or -1. Sorted keys make this a merge: for offsets
// that differ in z only, the wanted keys are close together and grow with i, so one moving position per (dx, dy)
// finds them without a search.
void neighbor_table(const int64_t* keys, const int32_t* order, const int32_t* offsets, int32_t* table, int64_t* status,
                    int64_t count, int64_t taps, int64_t threads) {
  FirstRow repeated(count);
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) {
      if (keys[i] == keys[i - 1]) repeated.report(std::max(order[i], order[i - 1]));
    }
    for (int64_t first = 0, last; first < taps; first = last) {
      const int32_t dx = offsets[3 * first], dy = offsets[3 * first + 1];
      for (last = first + 1; last < taps && offsets[3 * last] == dx && offsets[3 * last + 1] == dy;) ++last;
      const int64_t step = key_step(dx, dy, offsets[3 * first + 2]);
      int64_t start = lower_bound_key(keys, 0, count, keys[begin] + step);
      for (int64_t i = begin; i < end; ++i) {
        while (start < count && keys[start] < keys[i] + step) ++start;
        int64_t position = start;
        for (int64_t k = first; k < last; ++k) {
          const int64_t target = keys[i] + key_step(dx, dy, offsets[3 * k + 2]);
          table[k * count + order[i]] = match_key(keys, order, count, target, position);
        }
      }
    }
  });
  status[1] = repeated.get();
}

// Fills the tables of a patch plan. `group` is the patch of every voxel in sorted order (0, 0, 1, ...); `children`
// must hold -1 everywhere.
void patch_tables(const int32_t* coords, const int32_t* order, const int32_t* group, int32_t* patch_coords,
                  int32_t* children, int32_t* parents, int32_t* slots, int64_t* status, int64_t count,
                  int64_t num_patches, int64_t patch, int64_t threads) {
  FirstRow repeated(count);
  parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    // A thread takes whole patches: those whose first voxel lies in its piece.
    while (begin > 0 && begin < end && group[begin] == group[begin - 1]) ++begin;
    for (int64_t i = begin; i < count && (i < end || (begin < end && group[i] == group[i - 1])); ++i) {
      const int32_t row = order[i], m = group[i];
      const int32_t* coord = coords + 4 * row;
      const int32_t slot = patch_slot(coord, static_cast<int32_t>(patch));
      parents[row] = m;
      slots[row] = slot;
      int32_t& child = children[slot * num_patches + m];
      if (child >= 0) repeated.report(row);
      child = row;
      if (i == 0 || group[i - 1] != m) {
        patch_coords[4 * m] = coord[0];
        for (int axis = 1; axis < 4; ++axis) patch_coords[4 * m + axis] = coord[axis] / static_cast<int32_t>(patch);
      }
    }
  });
  status[1] = repeated.get();
}

}  // namespace
}  // namespace d23

// keys[i] = key of the patch that holds coords[i]; coords int32 [count, 4].
D23_EXPORT int64_t d23_voxel_keys(const int32_t* coords, int64_t* keys, int64_t* status, int64_t count, int64_t patch,
                                  int64_t num_threads) {
  try {
    d23::voxel_keys(coords, keys, status, count, patch, num_threads);
    return D23_OK;
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}

// Sorts keys in place, stably; order[i] is where the i-th smallest was.
D23_EXPORT int64_t d23_sort_keys(int64_t* keys, int32_t* order, int64_t count, int64_t num_threads) {
  try {
    d23::RadixSort(keys, order, count, num_threads).run();
    return D23_OK;
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}

// table int32 [taps, count]; offsets int32 [taps, 3], sorted, each within ±kKeyMargin.
D23_EXPORT int64_t d23_neighbor_table(const int64_t* keys, const int32_t* order, const int32_t* offsets,
                                      int32_t* table, int64_t* status, int64_t count, int64_t taps,
                                      int64_t num_threads) {
  try {
    d23::neighbor_table(keys, order, offsets, table, status, count, taps, num_threads);
    return D23_OK;
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}

// patch_coords [num_patches, 4], children [patch³, num_patches] filled with -1, parents [count], slots [count].
D23_EXPORT int64_t d23_patch_tables(const int32_t* coords, const int32_t* order, const int32_t* group,
                                    int32_t* patch_coords, int32_t* children, int32_t* parents, int32_t* slots,
                                    int64_t* status, int64_t count, int64_t num_patches, int64_t patch,
                                    int64_t num_threads) {
  try {
    d23::patch_tables(coords, order, group, patch_coords, children, parents, slots, status, count, num_patches, patch,
                      num_threads);
    return D23_OK;
  } catch (const std::bad_alloc&) {
    return D23_OUT_OF_MEMORY;
  }
}
