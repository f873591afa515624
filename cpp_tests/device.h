// The device that the suites run on. The same objects are linked into one executable for each
// backend; device_cpu.cpp and device_cuda.cpp are what differs between them.
#pragma once

#include <memory>

#include "spectralkv/config.h"
#include "spectralkv/stream.h"
#include "spectralkv/tensor.h"

namespace spectralkv::test {

/// The same configuration on the device under test. Faulty slots and lists must throw at once.
GraphConfig on_tested_device(GraphConfig config);

/// The arguments of one call, where the device under test can reach them. Suites hold all tensors
/// in host memory (HostTensor) and say "cpu" for the device under test, so that any other device is
/// a wrong one. On CUDA the call gets copies in device memory, gaps included, on a stream that does
/// not wait for the default one; copies are poisoned behind the call, in the order of the stream,
/// and what the call may write comes back when this object goes, also after an error.
class DeviceCall {
 public:
  /// To a manager on `device`.
  explicit DeviceCall(Device device);
  ~DeviceCall();
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;

  ConstTensorView operator()(const ConstTensorView& read);
  TensorView operator()(const TensorView& written);
  Stream stream() const;

 private:
  struct Mirrors;
  std::unique_ptr<Mirrors> mirrors_;
};

}  // namespace spectralkv::test
