#include <iostream>

#include "spectralkv/version.h"

int main() {
  std::cout << "spectralkv " << spectralkv::version() << ", CUDA devices: ";
  if (const int devices = spectralkv::cuda_device_count(); devices > 0) {
    std::cout << devices << '\n';
  } else {
    std::cout << "none (" << spectralkv::cuda_status() << ")\n";
  }
}
