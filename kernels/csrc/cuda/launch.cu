#include "cuda/launch.h"

// The text of the last CUDA error on this thread, for messages.
D23_EXPORT const char* d23_cuda_error_text() { return cudaGetErrorString(d23::last_cuda_error); }

// Whether the driver runs what this was compiled with; it may be older than the toolkit allows.
D23_EXPORT int64_t d23_cuda_ready() {
  int count = 0;
  D23_CUDA_TRY(cudaGetDeviceCount(&count));
  return D23_OK;
}
