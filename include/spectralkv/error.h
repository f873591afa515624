// The errors that libspectralkv throws.
#pragma once

#include <stdexcept>
#include <string>

#include "spectralkv/export.h"

namespace spectralkv {

/// Base class of everything this library throws.
class SPECTRALKV_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A caller's argument is wrong. The message names the operation, what was expected and what came;
/// the object that threw is as it was before the call.
class SPECTRALKV_API InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// The requested device has no backend here. The message says why.
class SPECTRALKV_API BackendUnavailable : public Error {
 public:
  using Error::Error;
};

/// A CUDA call failed. The message names the call.
class SPECTRALKV_API CudaError : public Error {
 public:
  using Error::Error;
};

}  // namespace spectralkv
