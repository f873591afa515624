// Everything libspectralkv offers.
#pragma once

#include "spectralkv/attention.h"      // IWYU pragma: export
#include "spectralkv/config.h"         // IWYU pragma: export
#include "spectralkv/error.h"          // IWYU pragma: export
#include "spectralkv/graph_manager.h"  // IWYU pragma: export
#include "spectralkv/monitor.h"        // IWYU pragma: export
#include "spectralkv/stream.h"         // IWYU pragma: export
#include "spectralkv/tensor.h"         // IWYU pragma: export
#include "spectralkv/version.h"        // IWYU pragma: export
