// The device-wide algorithms of cub that the kernels use, with cub's calling convention: a first call without
// temporary storage asks for its size. The second call fills that storage with garbage before it computes, so that
// storage which overlaps the data, or is too small, shows.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <vector>

#include "cuda_runtime.h"

namespace cub {
namespace d23_detail {

// True if this is the call that asks for the size; then `bytes` is set.
inline bool asks_for_size(void* temporary, size_t& bytes, size_t needed) {
  if (temporary == nullptr) bytes = needed;
  return temporary == nullptr;
}

inline cudaError_t scribble(void* temporary, size_t bytes, size_t needed) {
  if (bytes < needed) return cudaErrorInvalidValue;
  std::memset(temporary, 0xab, needed);
  return cudaSuccess;
}

// The bits [begin, end) of a key in the order of its values, as a radix sort sees them.
template <class Key>
uint64_t radix_bits(Key key, int begin, int end) {
  constexpr int width = 8 * sizeof(Key);
  uint64_t bits = 0;
  std::memcpy(&bits, &key, sizeof(Key));
  const uint64_t sign = uint64_t{1} << (width - 1), all = width == 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
  if (std::is_floating_point<Key>::value) bits = bits & sign ? ~bits & all : bits | sign;
  else if (std::is_signed<Key>::value) bits ^= sign;
  bits >>= begin;
  return end - begin >= 64 ? bits : bits & ((uint64_t{1} << (end - begin)) - 1);
}

template <class Key>
std::vector<int64_t> sorted_order(const Key* keys, int64_t count, int begin, int end) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return radix_bits(keys[a], begin, end) < radix_bits(keys[b], begin, end);
  });
  return order;
}

}  // namespace d23_detail

struct DeviceScan {
  template <class In, class Out, class Count>
  static cudaError_t ExclusiveSum(void* temporary, size_t& bytes, In in, Out out, Count count, cudaStream_t = nullptr) {
    return scan(temporary, bytes, in, out, static_cast<int64_t>(count), true);
  }
  template <class In, class Out, class Count>
  static cudaError_t InclusiveSum(void* temporary, size_t& bytes, In in, Out out, Count count, cudaStream_t = nullptr) {
    return scan(temporary, bytes, in, out, static_cast<int64_t>(count), false);
  }

 private:
  template <class In, class Out>
  static cudaError_t scan(void* temporary, size_t& bytes, In in, Out out, int64_t count, bool exclusive) {
    using T = std::decay_t<decltype(in[0])>;
    const size_t needed = 1 + static_cast<size_t>(count) / 64 * sizeof(T);
    if (d23_detail::asks_for_size(temporary, bytes, needed)) return cudaSuccess;
    if (cudaError_t error = d23_detail::scribble(temporary, bytes, needed)) return error;
    T sum{};
    for (int64_t i = 0; i < count; ++i) {
      const T item = in[i];  // before out[i], which may be the same place
      out[i] = exclusive ? sum : static_cast<T>(sum + item);
      sum = static_cast<T>(sum + item);
    }
    return cudaSuccess;
  }
};

struct DeviceRadixSort {
  template <class Key, class Value, class Count>
  static cudaError_t SortPairs(void* temporary, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values,
                               Value* sorted_values, Count count, int begin = 0, int end = 8 * sizeof(Key),
                               cudaStream_t = nullptr) {
    const int64_t n = static_cast<int64_t>(count);
    const size_t needed = 1 + static_cast<size_t>(n) * (sizeof(Key) + sizeof(Value));
    if (d23_detail::asks_for_size(temporary, bytes, needed)) return cudaSuccess;
    if (cudaError_t error = d23_detail::scribble(temporary, bytes, needed)) return error;
    const auto order = d23_detail::sorted_order(keys, n, begin, end);
    for (int64_t i = 0; i < n; ++i) sorted_keys[i] = keys[order[i]], sorted_values[i] = values[order[i]];
    return cudaSuccess;
  }

  template <class Key, class Count>
  static cudaError_t SortKeys(void* temporary, size_t& bytes, const Key* keys, Key* sorted_keys, Count count,
                              int begin = 0, int end = 8 * sizeof(Key), cudaStream_t = nullptr) {
    const int64_t n = static_cast<int64_t>(count);
    const size_t needed = 1 + static_cast<size_t>(n) * sizeof(Key);
    if (d23_detail::asks_for_size(temporary, bytes, needed)) return cudaSuccess;
    if (cudaError_t error = d23_detail::scribble(temporary, bytes, needed)) return error;
    const auto order = d23_detail::sorted_order(keys, n, begin, end);
    for (int64_t i = 0; i < n; ++i) sorted_keys[i] = keys[order[i]];
    return cudaSuccess;
  }
};

}  // namespace cub
