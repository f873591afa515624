// Where the engine's buffers lie.
#pragma once

#include <cstddef>
#include <memory>

#include "spectralkv/tensor.h"

/// Zeroed memory that the program can read and write, and so can `device`.
std::shared_ptr<void> allocate_bytes(std::size_t bytes, spectralkv::Device device);

template <class T>
std::shared_ptr<T[]> allocate(std::size_t count, spectralkv::Device device) {
  return std::static_pointer_cast<T[]>(allocate_bytes(count * sizeof(T), device));
}
