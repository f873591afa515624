#include "cuda/fault.h"

#include <string>
#include <string_view>

#include "validate.h"

namespace spectralkv::cuda {

void throw_fault(std::string_view operation, const FaultRecord& record) {
  const std::string where =
      " of sequence " + std::to_string(record.sequence) + ", head " + std::to_string(record.head);
  const std::string value = std::to_string(record.value);
  const std::string limit = std::to_string(record.limit);
  switch (static_cast<Fault>(record.fault)) {
    case Fault::slot_range:
      detail::throw_invalid(operation, "the slot" + where, "in [0, " + limit + "]", value);
    case Fault::slot_taken:
      detail::throw_invalid(operation, "the slot" + where, "free", value + ", which holds a token");
    case Fault::slots_differ:
      detail::throw_invalid(operation, "the slots of heads that share a graph", "equal",
                            value + " and " + limit);
    case Fault::layer_full:
      detail::throw_invalid(operation, "the layer's length", "at most its capacity " + limit,
                            value);
    case Fault::keep_order:
      detail::throw_invalid(operation, "the kept slots" + where,
                            "ascending slots in use, with every -1 before or every -1 behind them",
                            value + " after " + limit);
    case Fault::keep_empty:
      detail::throw_invalid(operation, "the kept slots" + where, "slots that hold a token",
                            value + ", which is empty");
    case Fault::keep_differ:
      detail::throw_invalid(operation, "the kept slots of heads that share a graph", "equal",
                            value + where);
    case Fault::keep_count:
    case Fault::none:
      break;
  }
  detail::throw_invalid(operation, "the number of kept slots" + where, limit, value);
}

}  // namespace spectralkv::cuda
