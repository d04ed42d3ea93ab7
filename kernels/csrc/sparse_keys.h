// Voxel coordinates as 64-bit keys, and the searches on sorted keys that the CPU and CUDA maps share.
//
// A key holds (batch, x, y, z) in 15 + 16 + 16 + 16 bits, so that comparing keys compares coordinates in that order
// and a neighbour's key is the voxel's key plus a constant. Every spatial field is stored with a margin on both
// sides: stepping by up to kKeyMargin cells never carries into the next field.
#pragma once

#include "portable.h"

namespace d23 {

constexpr int64_t kKeyMargin = 8;
constexpr int64_t kMaxCoord = (int64_t{1} << 16) - 2 * kKeyMargin;  // x, y, z must be below this
constexpr int64_t kMaxBatch = int64_t{1} << 15;                     // and the batch index below this

D23_FN int64_t pack_key(int64_t batch, int64_t x, int64_t y, int64_t z) {
  return (batch << 48) + ((x + kKeyMargin) << 32) + ((y + kKeyMargin) << 16) + (z + kKeyMargin);
}

// What to add to a voxel's key to get the key of the voxel at this offset.
D23_FN int64_t key_step(int64_t dx, int64_t dy, int64_t dz) { return dx * (int64_t{1} << 32) + dy * (int64_t{1} << 16) + dz; }

D23_FN bool coord_fits(const int32_t* coord) {
  return coord[0] >= 0 && coord[0] < kMaxBatch && coord[1] >= 0 && coord[1] < kMaxCoord && coord[2] >= 0 &&
         coord[2] < kMaxCoord && coord[3] >= 0 && coord[3] < kMaxCoord;
}

// Key of the patch of patch³ cells that holds this voxel; patch = 1 gives the voxel itself.
D23_FN int64_t patch_key(const int32_t* coord, int64_t patch) {
  return pack_key(coord[0], coord[1] / patch, coord[2] / patch, coord[3] / patch);
}

// Position of a voxel within its patch: (x mod p)·p² + (y mod p)·p + z mod p.
D23_FN int32_t patch_slot(const int32_t* coord, int32_t patch) {
  return (coord[1] % patch * patch + coord[2] % patch) * patch + coord[3] % patch;
}

// First index in [begin, end) whose key is not below `target`; keys are sorted.
D23_FN int64_t lower_bound_key(const int64_t* keys, int64_t begin, int64_t end, int64_t target) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (keys[middle] < target) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Advances `position` to the first key not below `target` and returns that voxel's row, or -1 if it is not there.
D23_FN int32_t match_key(const int64_t* keys, const int32_t* order, int64_t count, int64_t target, int64_t& position) {
  while (position < count && keys[position] < target) ++position;
  return position < count && keys[position] == target ? order[position] : -1;
}

}  // namespace d23
