#include "spectralkv/attention.h"

#include <string>

#include "backend.h"
#include "validate.h"

namespace spectralkv {

void decode_attention(const ConstTensorView& query, const ConstTensorView& keys,
                      const ConstTensorView& values, const ConstTensorView& positions,
                      std::int64_t length, const TensorView& out, const ScoreOptions& options,
                      Device device, Stream stream) {
  using detail::kAny;
  constexpr std::string_view kOperation = "decode_attention";
  detail::check_score_options(kOperation, options);
  detail::check_tensor(query, {.operation = kOperation,
                               .name = "query",
                               .axes = "(B, Hq, D)",
                               .extents = {kAny, kAny, kAny},
                               .dtypes = {DType::f32, DType::f16, DType::bf16},
                               .device = device});
  detail::check_tensor(keys, {.operation = kOperation,
                              .name = "keys",
                              .axes = "(B, Hkv, S, D)",
                              .extents = {query.size(0), kAny, kAny, query.size(2)},
                              .dtypes = {DType::f32, DType::f16, DType::bf16},
                              .device = device});
  detail::check_same_dtype(kOperation, "keys", keys, query);
  if (keys.size(1) == 0 || query.size(1) % keys.size(1) != 0) {
    detail::throw_invalid(kOperation, "the number of query heads",
                          "a multiple of the number of KV heads " + std::to_string(keys.size(1)),
                          std::to_string(query.size(1)));
  }
  detail::check_range(kOperation, "length", length, 0, keys.size(2));
  detail::check_attended(kOperation, query, keys, values, length, out);
  if (!positions.empty()) {
    detail::check_tensor(positions, {.operation = kOperation,
                                     .name = "positions",
                                     .axes = "(B, Hkv, S)",
                                     .extents = {keys.size(0), keys.size(1), kAny},
                                     .dtypes = {DType::i32},
                                     .device = device});
    detail::check_slots(kOperation, "positions", positions, length);
  }
  if (query.size(0) == 0 || query.size(1) == 0 || query.size(2) == 0) return;
  const detail::AttentionArgs args{.query = query,
                                   .keys = keys,
                                   .attended = {.values = values, .out = out},
                                   .positions = positions,
                                   .length = length,
                                   .scale = detail::scale_of(options, query.size(2)),
                                   .softcap = options.softcap};
  if (device.type == DeviceType::cpu) {
    detail::decode_attention_on_cpu(args);
  } else {
    detail::decode_attention_on_cuda(args, device.index, stream);
  }
}

}  // namespace spectralkv
