// A build without the CUDA toolkit: memory of the host alone.
#include <cstddef>
#include <stdexcept>

#include "memory.h"

std::shared_ptr<void> allocate_bytes(std::size_t bytes, spectralkv::Device device) {
  if (device.type != spectralkv::DeviceType::cpu) {
    throw std::runtime_error("[embed] device must be cpu in a build without -DEMBED_CUDA=ON, got " +
                             spectralkv::name_of(device));
  }
  return std::make_shared<std::max_align_t[]>(bytes / sizeof(std::max_align_t) + 1);
}
